// Other programs, run to their end with their output collected.

import process from "node:process";

/** How a program is run. */
export interface RunOptions {
  /** Variables beside those of this process. */
  readonly env?: Record<string, string>;
  /** Whether its output is shown as it comes. */
  readonly show?: boolean;
  /** After so many seconds it is stopped; never by default. */
  readonly limit?: number;
}

/** How a program ended. */
export interface Ended {
  /** Whether it ended by itself, with exit code 0. */
  readonly success: boolean;
  /** Both streams, in the order in which they came. */
  readonly text: string;
  /** How it ended, in words. */
  readonly how: string;
}

/** Runs a program; one that cannot be started has ended without success. */
export async function run(command: string, args: readonly string[], options: RunOptions = {}): Promise<Ended> {
  const { env = {}, show = false, limit } = options;
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command(command, {
      args: [...args],
      env: { NO_COLOR: "1", ...env },
      stdin: "null",
      stdout: "piped",
      stderr: "piped",
    }).spawn();
  } catch (error) {
    return { success: false, text: "", how: (error as Error).message };
  }

  let text = "";
  const streams = [child.stdout.getReader(), child.stderr.getReader()];
  const collect = async (reader: ReadableStreamDefaultReader<Uint8Array>) => {
    const decoder = new TextDecoder();
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      const piece = decoder.decode(read.value, { stream: true });
      text += piece;
      if (show) process.stdout.write(piece);
    }
  };

  let overdue = false;
  const timers: ReturnType<typeof setTimeout>[] = [];
  if (limit !== undefined) {
    const stop = () => {
      overdue = true;
      child.kill("SIGTERM"); // test runners stop their own children then
      timers.push(setTimeout(() => {
        child.kill("SIGKILL");
        for (const reader of streams) reader.cancel(); // a grandchild may hold them open
      }, 5000));
    };
    timers.push(setTimeout(stop, 1000 * limit));
  }
  const [{ success, code, signal }] = await Promise.all([child.status, ...streams.map(collect)]);
  for (const timer of timers) clearTimeout(timer);
  const how = overdue ? `did not end within ${limit} s` : `ended with ${signal ?? `exit code ${code}`}`;
  return { success: success && !overdue, text, how };
}
