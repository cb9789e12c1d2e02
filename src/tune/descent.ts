import type { CacheKey } from "../cache/cache_record.ts";
import { FlashMLAError } from "../op/errors.ts";
import type { Invocation, MeasuringOptions } from "./invocation.ts";
import type { Kernel } from "./kernel.ts";
import type { AutotunePolicy } from "./policy.ts";
import type { ConfigSource, SelectionContext, SelectionDetail, SelectionEvent } from "./selection_event.ts";

/** Whom a chain tells of its decisions. */
export type SelectionListener<Cfg> = (event: SelectionEvent<Cfg>) => unknown;

/** One call on its way down the selector chain: what is asked, and what each level had to say. */
export class Descent<Call, Cfg, Out> {
  /** The operation. */
  readonly kernel: Kernel<Call, Cfg, Out>;
  /** The call. */
  readonly invocation: Invocation<Call>;
  /** The policy in force when the call was made. */
  readonly policy: AutotunePolicy;
  /** The configurations worth measuring. */
  readonly candidates: readonly Cfg[];
  /** What every event of this call carries. */
  readonly context: SelectionContext;
  readonly #listener: SelectionListener<Cfg>;
  readonly #said: string[] = [];
  readonly #refused: Set<Cfg> = new Set();
  #cause: unknown;

  private constructor(
    kernel: Kernel<Call, Cfg, Out>,
    invocation: Invocation<Call>,
    policy: AutotunePolicy,
    candidates: readonly Cfg[],
    context: SelectionContext,
    listener: SelectionListener<Cfg>,
  ) {
    this.kernel = kernel;
    this.invocation = invocation;
    this.policy = policy;
    this.candidates = candidates;
    this.context = context;
    this.#listener = listener;
  }

  /**
   * Starts at the top of the chain.
   *
   * @param kernel The operation.
   * @param invocation The call.
   * @param policy The policy in force when the call was made.
   * @param listener Hears of every decision.
   * @returns The call with its keys.
   */
  static async begin<Call, Cfg, Out>(
    kernel: Kernel<Call, Cfg, Out>,
    invocation: Invocation<Call>,
    policy: AutotunePolicy,
    listener: SelectionListener<Cfg>,
  ): Promise<Descent<Call, Cfg, Out>> {
    const callKey = await invocation.callKey();
    const measuring = { forwardOnly: kernel.hasGradients && !policy.validateBackward };
    const { candidates, key, failure } = await shortlist(kernel, invocation, callKey, measuring);
    const context = { op: invocation.op, callKey, key };
    const call = new Descent(kernel, invocation, policy, candidates, context, listener);
    if (failure !== undefined) call.failed("autotune", failure);
    return call;
  }

  /** Reports a decision. */
  emit(detail: SelectionDetail<Cfg>): void {
    try {
      Promise.resolve(this.#listener({ ...this.context, ...detail })).catch(() => {});
    } catch {
      // A listener is there to watch; what it throws must not change what it watches.
    }
  }

  /** Notes that a level was not asked. */
  passed(level: ConfigSource, reason: string): null {
    this.#said.push(`${level}: ${reason}`);
    return null;
  }

  /** Reports that a cache had nothing. */
  missed(level: "overlay" | "memory" | "persistent"): null {
    this.emit({ type: `${level}_miss` });
    return this.passed(level, "nothing");
  }

  /** Reports that a level failed. */
  failed(level: ConfigSource, error: unknown): null {
    const reason = messageOf(error);
    this.#cause = error;
    this.emit({ type: "error", source: level, reason, error });
    return this.passed(level, reason);
  }

  /** Whether this device and problem can run what a level gave; a refusal is reported. */
  accepts(level: "overlay" | "memory" | "persistent" | "autotune", cfg: Cfg): boolean {
    try {
      this.kernel.checkCfg(this.invocation, cfg);
      return true;
    } catch (error) {
      const reason = messageOf(error);
      this.#refused.add(cfg);
      this.emit({ type: "rejected", source: level, cfg, reason });
      this.passed(level, reason);
      return false;
    }
  }

  /** Whether {@link Descent.accepts} has refused this very configuration. */
  hasRefused(cfg: Cfg): boolean {
    return this.#refused.has(cfg);
  }

  /** The error at the bottom of the chain: what each level had to say. */
  exhausted(): FlashMLAError {
    const { op, key } = this.context;
    const message = `Cannot choose a configuration for ${op} (${key.bucket}): ${this.#said.join("; ")}`;
    return new FlashMLAError("no-config", message, { cause: this.#cause });
  }
}

/** What may be measured for a call, and the key of the result. */
interface Shortlist<Cfg> {
  readonly candidates: readonly Cfg[];
  readonly key: CacheKey;
  /** What the kernel threw instead of naming candidates. */
  readonly failure?: unknown;
}

// By kernel, then by call. Calls repeat: listing and hashing 60 candidates takes longer than running a short kernel.
const shortlists = new WeakMap<object, Map<string, Shortlist<unknown>>>();

async function shortlist<Call, Cfg, Out>(
  kernel: Kernel<Call, Cfg, Out>,
  invocation: Invocation<Call>,
  callKey: string,
  measuring: MeasuringOptions,
): Promise<Shortlist<Cfg>> {
  let known = shortlists.get(kernel) as Map<string, Shortlist<Cfg>> | undefined;
  if (known === undefined) shortlists.set(kernel, known = new Map<string, Shortlist<Cfg>>());
  const name = `${invocation.device} ${callKey} ${invocation.bucket}${measuring.forwardOnly ? " forward only" : ""}`;
  const found = known.get(name);
  if (found !== undefined) return found;
  let made: Shortlist<Cfg>;
  try {
    const candidates = kernel.candidateCfgs(invocation);
    made = { candidates, key: await invocation.cacheKey(candidates, measuring) };
  } catch (failure) {
    // Nothing to measure; an explicit configuration may still do.
    return { candidates: [], key: await invocation.cacheKey([], measuring), failure };
  }
  if (known.size >= 1024) known.clear();
  known.set(name, made);
  return made;
}

/** What to tell a person about something thrown. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
