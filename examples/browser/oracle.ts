/// <reference lib="dom" />
// The oracle, asked from the page.

import type { HostInputs, Tensor } from "../../mod.ts";

/** What the worker is asked. */
export interface OracleQuestion {
  readonly inputs: HostInputs;
  /** How often to run. */
  readonly repeats: number;
}

/** What it answers. */
export interface OracleAnswer {
  readonly output: Tensor;
  /** Milliseconds of each run. */
  readonly times: readonly number[];
}

/** What it answers when it cannot. */
export interface OracleFailure {
  readonly failure: string;
}

/** The reference platform in a worker, one question at a time. */
export class Oracle {
  readonly #worker = new Worker(new URL("./oracle_worker.js", import.meta.url), { type: "module" });

  /** Computes a call, unmasked and with the default scale. */
  ask(inputs: HostInputs, repeats: number): Promise<OracleAnswer> {
    return new Promise((resolve, reject) => {
      const fail = (why: string) => reject(new Error(`The oracle's worker failed: ${why}`));
      this.#worker.onmessage = ({ data }: MessageEvent<OracleAnswer | OracleFailure>) =>
        "failure" in data ? fail(data.failure) : resolve(data);
      this.#worker.onerror = ({ message }) => fail(message);
      const question: OracleQuestion = { inputs, repeats };
      this.#worker.postMessage(question);
    });
  }

  /** Ends the worker, whatever it is doing. */
  close(): void {
    this.#worker.terminate();
  }
}
