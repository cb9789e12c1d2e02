// Compute pipelines, compiled once per WGSL text and device.

import { FlashMLAError } from "../op/errors.ts";
import { settled } from "./settled.ts";

/** Compiles WGSL on one device and remembers the pipelines by their source. */
export class PipelineCache {
  readonly #device: GPUDevice;
  readonly #pipelines = new Map<string, Promise<GPUComputePipeline>>();

  /** @param device The device to compile on. */
  constructor(device: GPUDevice) {
    this.#device = device;
  }

  /** Number of pipelines compiled or being compiled. */
  get size(): number {
    return this.#pipelines.size;
  }

  /** Forgets every pipeline, so that the next call compiles again. */
  clear(): void {
    this.#pipelines.clear();
  }

  /**
   * The pipeline of a kernel whose entry point is `main`.
   *
   * @param label Name of the kernel in error messages and captures.
   * @param code The WGSL source.
   * @returns The compiled pipeline; a failure is remembered no longer than its call.
   * @throws {FlashMLAError} With code `device` and the compiler's messages.
   */
  get(label: string, code: string): Promise<GPUComputePipeline> {
    let pipeline = this.#pipelines.get(code);
    if (pipeline === undefined) {
      pipeline = this.#compile(label, code);
      this.#pipelines.set(code, pipeline);
      pipeline.catch(() => this.#pipelines.delete(code));
    }
    return pipeline;
  }

  async #compile(label: string, code: string): Promise<GPUComputePipeline> {
    this.#device.pushErrorScope("validation");
    const module = this.#device.createShaderModule({ label: `flash-mla ${label}`, code });
    const scope = this.#device.popErrorScope();
    const compiled = this.#device.createComputePipelineAsync({
      label: `flash-mla ${label}`,
      layout: "auto",
      compute: { module, entryPoint: "main" },
    });
    const [error, outcome] = await settled(
      this.#device,
      Promise.all([scope, compiled.then((pipeline) => ({ pipeline }), (reason) => ({ reason }))]),
    );
    const messages = await compilationMessages(module);
    if (error !== null || "reason" in outcome) {
      const reason = error?.message ?? String("reason" in outcome ? outcome.reason : "");
      throw new FlashMLAError("device", `Cannot compile kernel "${label}": ${[reason, ...messages].join("; ")}`);
    }
    return outcome.pipeline;
  }
}

async function compilationMessages(module: GPUShaderModule): Promise<string[]> {
  const info = await module.getCompilationInfo?.();
  return (info?.messages ?? []).filter((message) => message.type === "error")
    .map((message) => `line ${message.lineNum}: ${message.message}`);
}
