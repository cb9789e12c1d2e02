// How far training is, on stderr: one line that is redrawn on a terminal, a line now and then elsewhere.

/** What the bar is drawn on. */
export interface ProgressStream {
  /** Whether it is a terminal, where a line can be drawn again. */
  readonly isTTY?: boolean;
  /** The width of the terminal. */
  readonly columns?: number;
  write(text: string): unknown;
}

/** How far it is. */
export interface Progress {
  /** Steps that are done. */
  readonly step: number;
  /** Steps in all. */
  readonly steps: number;
  /** The loss of late, in nats per character. */
  readonly loss: number;
  /** Steps done by this process, and the seconds that they took. */
  readonly here: { readonly steps: number; readonly seconds: number };
  /** Characters that a step learns from. */
  readonly tokensPerStep: number;
}

/** Seconds between lines where nothing can be redrawn, after the first step. */
const quietSeconds = 10;

/** A bar on a stream. */
export interface ProgressBar {
  show(progress: Progress): void;
  /** Leaves the last line as it stands. */
  end(): void;
}

/** Draws on a stream; `now` is in milliseconds. */
export function progressBar(stream: ProgressStream, now: () => number = () => performance.now()): ProgressBar {
  let drawn = false;
  let lastLine = -Infinity;
  return {
    show(progress) {
      if (stream.isTTY) {
        stream.write(`\r\x1b[K${progressLine(progress, stream.columns ?? 80)}`);
        drawn = true;
      } else if (
        progress.here.steps < 2 || progress.step === progress.steps || now() - lastLine >= quietSeconds * 1000
      ) {
        stream.write(`${progressText(progress)}\n`);
        lastLine = now();
      }
    },
    end() {
      if (drawn) stream.write("\n");
      drawn = false;
    },
  };
}

/** The line of a terminal: a bar in what room the text leaves. */
export function progressLine(progress: Progress, columns: number): string {
  const text = progressText(progress);
  const room = Math.min(40, columns - text.length - 3);
  return room < 8 ? text.slice(0, columns - 1) : `${bar(progress.step / progress.steps, room)}  ${text}`;
}

function progressText({ step, steps, loss, here, tokensPerStep }: Progress): string {
  const percent = `${Math.floor(100 * step / steps)}%`.padStart(4);
  const parts = [`${percent}  step ${String(step).padStart(String(steps).length)}/${steps}`];
  // The first step on a GPU compiles its kernels, for seconds to a minute on a software adapter.
  parts.push(here.steps === 0 ? "starting …" : `loss ${loss.toFixed(3)}`);
  if (here.steps > 0 && here.seconds > 0) {
    parts.push(`${Math.round(here.steps * tokensPerStep / here.seconds).toLocaleString("en-US")} tokens/s`);
    parts.push(`${clock((steps - step) * here.seconds / here.steps)} left`);
  }
  return parts.join("  ");
}

/** A bar of a number of cells, drawn to an eighth of a cell. */
function bar(part: number, cells: number): string {
  const eighths = Math.round(part * cells * 8);
  const full = Math.floor(eighths / 8);
  const rest = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8];
  return `▕${("█".repeat(full) + rest).padEnd(cells)}▏`;
}

/** Seconds as m:ss. */
export function clock(seconds: number): string {
  const whole = Math.round(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
