// How far generating is, on stderr: one line that is redrawn on a terminal, a line now and then elsewhere.

import type { ProgressStream } from "../train/progress_bar.ts";

/** Milliseconds between lines that are redrawn, and where nothing can be. */
const quietMs = { terminal: 100, elsewhere: 10_000 };

/** Shows how far one way is. */
export interface Progress {
  show(tokens: number): void;
  /** Takes the line off a terminal. */
  end(): void;
}

/** Draws on a stream; `now` is in milliseconds. */
export function progress(
  stream: ProgressStream,
  way: string,
  tokens: number,
  now: () => number = () => performance.now(),
): Progress {
  const begin = now();
  let lastLine = begin;
  const write = (text: string) => stream.write(stream.isTTY ? `\r\x1b[K${text}` : `${text}\n`);
  write(`${way}  starting …`);
  return {
    show(done) {
      const quiet = stream.isTTY ? quietMs.terminal : quietMs.elsewhere;
      if (done < tokens && now() - lastLine < quiet) return;
      lastLine = now();
      const rate = done / (lastLine - begin) * 1000;
      write(`${way}  ${done}/${tokens} tokens  ${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
    },
    end: () => stream.isTTY && stream.write("\r\x1b[K"),
  };
}
