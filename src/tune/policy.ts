import { Scope } from "../cache/scope.ts";
import { readEnvironment } from "../environment.ts";

/** What the selector chain may do when no cache knows a configuration. */
export interface AutotunePolicy {
  /** Whether candidates may be measured. Default `true`. */
  readonly allowAutotune: boolean;
  /** Whether the kernel's guess may be used. Default `true`. */
  readonly allowHeuristics: boolean;
  /**
   * What a miss leads to: measuring, or the kernel's guess at once. Default: the environment's `FLASH_MLA_AUTOTUNE_POLICY`,
   * then `EJKERNEL_AUTOTUNE_POLICY`, then `autotune`.
   */
  readonly cacheMissFallback: "autotune" | "heuristics";
  /**
   * Whether candidates of an operation that has gradients are timed forward and backward, and rejected when their gradients
   * are wrong. Turn it off where there is no training: what wins is kept apart from what won with it. On adapters that run
   * on the CPU, where compiling takes longest, calls that ask for no gradients do without in any case. Default `true`.
   */
  readonly validateBackward: boolean;
}

/** What {@link autotunePolicy} reads from outside; for tests. */
export interface PolicySurroundings {
  /** Reads an environment variable. */
  readonly environment?: (name: string) => string | undefined;
  /** Says what is wrong with one. */
  readonly warn?: (message: string) => void;
}

/**
 * Completes a policy with the defaults. A variable with another value than `autotune` or `heuristics` counts as unset;
 * a warning says so once.
 *
 * @param updates The fields that differ from the defaults.
 * @param surroundings Where the environment is read and warnings go.
 * @returns The complete policy.
 */
export function autotunePolicy(
  updates: Partial<AutotunePolicy> = {},
  surroundings: PolicySurroundings = {},
): AutotunePolicy {
  return {
    allowAutotune: updates.allowAutotune ?? true,
    allowHeuristics: updates.allowHeuristics ?? true,
    cacheMissFallback: updates.cacheMissFallback ?? fallbackFromEnvironment(surroundings),
    validateBackward: updates.validateBackward ?? true,
  };
}

/** A policy, and the overrides of the scopes that are open. */
export class ScopedPolicy {
  readonly #base: AutotunePolicy;
  readonly #overrides: Scope<Partial<AutotunePolicy>> = new Scope();

  /**
   * Starts without overrides.
   *
   * @param base The policy outside every scope.
   */
  constructor(base: AutotunePolicy) {
    this.#base = base;
  }

  /** The policy in force here: each field is the innermost override's. */
  get current(): AutotunePolicy {
    const field = <K extends keyof AutotunePolicy>(name: K): AutotunePolicy[K] =>
      this.#overrides.find((updates) => updates[name]) ?? this.#base[name];
    return {
      allowAutotune: field("allowAutotune"),
      allowHeuristics: field("allowHeuristics"),
      cacheMissFallback: field("cacheMissFallback"),
      validateBackward: field("validateBackward"),
    };
  }

  /** Opens a scope until the handle is disposed. */
  enter(updates: Partial<AutotunePolicy>): Disposable {
    return this.#overrides.enter({ ...updates });
  }

  /** Runs a function inside a scope. */
  run<R>(updates: Partial<AutotunePolicy>, fn: () => R): R {
    return this.#overrides.run({ ...updates }, fn);
  }
}

/** What has a policy to override, such as a `ConfigSelectorChain`. */
export interface PolicyOwner {
  /** The policy and its overrides. */
  readonly scopedPolicy: ScopedPolicy;
}

/**
 * Changes fields of a chain's policy until the handle is disposed. Overrides nest; fields left out stay as they are outside.
 *
 * The block form also covers the function that called this one, until the block ends, if nothing was awaited before: use
 * the callback form where calls overlap. In browsers either form covers every call that starts while the override is open.
 *
 * @example
 * ```ts ignore
 * using _ = policyOverride(executor.chain, { cacheMissFallback: "heuristics" });
 * await executor.run(kernel, call);
 * ```
 *
 * @param chain The chain.
 * @param updates The fields to change.
 * @returns The handle, for `using`.
 */
export function policyOverride(chain: PolicyOwner, updates: Partial<AutotunePolicy>): Disposable;
/**
 * Changes fields of a chain's policy for the calls that a function makes, and for no others that overlap with them.
 *
 * @example
 * ```ts ignore
 * await policyOverride(executor.chain, { allowAutotune: false }, () => executor.run(kernel, call));
 * ```
 *
 * @param chain The chain.
 * @param updates The fields to change.
 * @param fn What to run. The override ends when the promise that it returns settles.
 * @returns What `fn` returns.
 */
export function policyOverride<R>(chain: PolicyOwner, updates: Partial<AutotunePolicy>, fn: () => R): R;
export function policyOverride<R>(
  chain: PolicyOwner,
  updates: Partial<AutotunePolicy>,
  fn?: () => R,
): Disposable | R {
  return fn === undefined ? chain.scopedPolicy.enter(updates) : chain.scopedPolicy.run(updates, fn);
}

const VARIABLES = ["FLASH_MLA_AUTOTUNE_POLICY", "EJKERNEL_AUTOTUNE_POLICY"];
const warned = new Set<string>();

function fallbackFromEnvironment(surroundings: PolicySurroundings): AutotunePolicy["cacheMissFallback"] {
  const { environment = readEnvironment, warn = console.warn } = surroundings;
  for (const name of VARIABLES) {
    const value = environment(name);
    if (value === "autotune" || value === "heuristics") return value;
    const message = `${name} must be "autotune" or "heuristics", got ${JSON.stringify(value)}: ignored`;
    if (value === undefined || value === "" || warned.has(message)) continue;
    warned.add(message);
    warn(message);
  }
  return "autotune";
}
