import { openOverlays } from "../cache/overlay_cache.ts";
import { FlashMLAError } from "../op/errors.ts";
import { messageOf } from "./descent.ts";
import type { Invocation } from "./invocation.ts";
import type { Kernel } from "./kernel.ts";
import { type Choice, ConfigSelectorChain } from "./selector_chain.ts";

/** What a call may say about its configuration. */
export interface ExecuteOptions<Cfg> {
  /** The configuration to use, for this call only; chosen by the chain when absent. */
  readonly cfg?: Cfg;
}

/** A call with its configuration decided. */
export type Compiled<Call, Out> = (call: Call) => Promise<Out>;

/** A call that was run, and the way to its gradients. Its functions need no `this`. */
export interface Differentiated<Out, Residuals, Gradients> {
  /** The result. */
  readonly output: Out;
  /** What the kernel kept for the gradients. */
  readonly residuals: Residuals;
  /**
   * Computes the gradients of the sum of `output · gradOutput`. May be called any number of times, also at the same time.
   *
   * @param gradOutput The gradient of the result, like the result.
   * @returns The gradients.
   * @throws {FlashMLAError} With code `invalid-input` when `gradOutput` does not fit the result, or after
   * {@link Differentiated.dispose}; and when the device fails.
   */
  vjp(gradOutput: Out): Promise<Gradients>;
  /** Lets go of the call and its residuals; gradients under way are still computed. Calling it twice does no harm. */
  dispose(): void;
  /** The same as `dispose`, for `using`. */
  [Symbol.dispose](): void;
}

/**
 * Runs an operation under the configuration that a selector chain chooses.
 *
 * @typeParam Call The call's tensors and options.
 * @typeParam Cfg The configuration.
 * @typeParam Out The result.
 */
export class Executor<Call, Cfg, Out> {
  /** What chooses. */
  readonly chain: ConfigSelectorChain<Call, Cfg, Out>;

  /**
   * Makes an executor over a chain.
   *
   * @param chain What chooses. Default: a chain with its defaults.
   */
  constructor(chain: ConfigSelectorChain<Call, Cfg, Out> = new ConfigSelectorChain()) {
    this.chain = chain;
  }

  /**
   * Chooses a configuration and runs the call under it.
   *
   * @param kernel The operation.
   * @param call The call.
   * @param options An explicit configuration.
   * @returns The result.
   * @throws {FlashMLAError} When the call is malformed, no configuration can be had, or the device fails.
   */
  async run(kernel: Kernel<Call, Cfg, Out>, call: Call, options: ExecuteOptions<Cfg> = {}): Promise<Out> {
    const { invocation, choice } = await this.prepare(kernel, call, options);
    return await kernel.run(invocation, choice.cfg);
  }

  /**
   * Chooses a configuration, runs the call under it, and keeps what its gradients need.
   *
   * @param kernel An operation that has gradients.
   * @param call The call.
   * @param options An explicit configuration.
   * @returns The result and the function that computes gradients, under the same configuration. Whoever asked disposes of it.
   * @throws {FlashMLAError} As {@link Executor.run} does; and with code `invalid-input` when the operation has no gradients.
   */
  async vjp<Residuals, Gradients>(
    kernel: Kernel<Call, Cfg, Out, Residuals, Gradients>,
    call: Call,
    options: ExecuteOptions<Cfg> = {},
  ): Promise<Differentiated<Out, Residuals, Gradients>> {
    const { invocation, choice } = await this.#prepare(kernel, call, options, true);
    const { output, residuals } = await kernel.fwdWithResiduals(invocation, choice.cfg);
    const { op } = invocation;
    // The only reference from here on: without it the call's tensors can be collected.
    let held: { readonly invocation: Invocation<Call>; readonly residuals: Residuals } | null = {
      invocation,
      residuals,
    };
    const dispose = () => void (held = null);
    return {
      output,
      residuals,
      async vjp(gradOutput) {
        if (held === null) {
          const why = "dispose() has freed its residuals; run the call again";
          throw new FlashMLAError("invalid-input", `Cannot compute gradients of ${op}: ${why}`);
        }
        return await kernel.vjp(held.invocation, choice.cfg, held.residuals, gradOutput);
      },
      dispose,
      [Symbol.dispose]: dispose,
    };
  }

  /**
   * Chooses the configuration that a call would run under, measuring if need be, and runs nothing.
   *
   * @param kernel The operation.
   * @param call The call.
   * @param options An explicit configuration.
   * @returns The configuration and the level of the chain that gave it.
   * @throws {FlashMLAError} When the call is malformed or no configuration can be had.
   */
  async choose(kernel: Kernel<Call, Cfg, Out>, call: Call, options: ExecuteOptions<Cfg> = {}): Promise<Choice<Cfg>> {
    return (await this.prepare(kernel, call, options)).choice;
  }

  /**
   * Chooses a configuration once, for calls like an example. Later calls pass the chain by, so that the configuration stays
   * what it is; calls of other shapes may use it as long as their problem can run it.
   *
   * @param kernel The operation.
   * @param exampleCall A call of the shapes to choose for.
   * @param options An explicit configuration.
   * @returns A function that runs a call under that configuration, and throws a {@link FlashMLAError} with code
   * `invalid-config` for a call that cannot run under it.
   * @throws {FlashMLAError} When the example is malformed or no configuration can be had.
   */
  async compile(
    kernel: Kernel<Call, Cfg, Out>,
    exampleCall: Call,
    options: ExecuteOptions<Cfg> = {},
  ): Promise<Compiled<Call, Out>> {
    const { invocation: example, choice } = await this.prepare(kernel, exampleCall, options);
    return async (call) => {
      const invocation = await kernel.prepare(call);
      try {
        kernel.checkCfg(invocation, choice.cfg);
      } catch (error) {
        throw new FlashMLAError(
          "invalid-config",
          `Cannot run a call of ${invocation.bucket} under the configuration compiled for ${example.bucket}: ` +
            messageOf(error),
          { cause: error },
        );
      }
      return await kernel.run(invocation, choice.cfg);
    };
  }

  /**
   * Validates a call and chooses its configuration: what {@link Executor.run} does before it runs.
   *
   * @param kernel The operation.
   * @param call The call.
   * @param options An explicit configuration.
   * @returns The call as the kernel prepared it, and its configuration.
   * @throws {FlashMLAError} When the call is malformed or no configuration can be had.
   */
  async prepare(
    kernel: Kernel<Call, Cfg, Out>,
    call: Call,
    options: ExecuteOptions<Cfg> = {},
  ): Promise<{ readonly invocation: Invocation<Call>; readonly choice: Choice<Cfg> }> {
    return await this.#prepare(kernel, call, options, false);
  }

  async #prepare(
    kernel: Kernel<Call, Cfg, Out>,
    call: Call,
    options: ExecuteOptions<Cfg>,
    asksForGradients: boolean,
  ): Promise<{ readonly invocation: Invocation<Call>; readonly choice: Choice<Cfg> }> {
    // Read before anything is awaited: a scope may close while the call is being prepared.
    const inForce = this.chain.policy;
    const overlays = openOverlays();
    const invocation = await kernel.prepare(call);
    const backward = asksForGradients || kernel.tunesBackward(invocation);
    const policy = { ...inForce, validateBackward: inForce.validateBackward && backward };
    return { invocation, choice: await this.chain.choose(invocation, kernel, { ...options, policy, overlays }) };
  }
}
