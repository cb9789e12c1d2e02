// Which implementations exist for an algorithm, by platform and backend.

import { FlashMLAError } from "./op/errors.ts";
import { Backend, canonicalPlatform, Platform } from "./op/platform.ts";

/** One line of {@link KernelRegistry.listImplementations}. */
export interface Registration<Implementation> {
  /** Operation name, such as `flash_mla`. */
  readonly algorithm: string;
  /** The platform it runs on. */
  readonly platform: Platform;
  /** The kind of processor it needs. */
  readonly backend: Backend;
  /** Which of several wins: the highest. */
  readonly priority: number;
  /** The implementation itself. */
  readonly implementation: Implementation;
}

/** How an implementation is registered. */
export interface RegisterOptions {
  /** Which of several wins: the highest. Default 0. */
  readonly priority?: number;
  /** Whether to take the place of one with the same platform, backend and priority. Default `false`. */
  readonly replace?: boolean;
}

/** What {@link KernelRegistry.get} looks for. */
export interface ImplementationQuery {
  /** The platform that must run it; every platform when absent. */
  readonly platform?: Platform;
  /** The processor at hand: matches implementations for it and those for `any`. Default `any`, which matches all. */
  readonly backend?: Backend;
}

/**
 * Implementations by algorithm, platform and backend. `xla` and `reference` name one platform: what is registered under
 * either is found and listed under both.
 *
 * @typeParam Implementation What is registered.
 */
export class KernelRegistry<Implementation> {
  readonly #registrations: Registration<Implementation>[] = [];

  /**
   * Adds an implementation.
   *
   * @param algorithm Operation name, such as `flash_mla`.
   * @param platform The platform it runs on.
   * @param backend The kind of processor it needs.
   * @param implementation The implementation.
   * @param options Its priority, and whether it may replace another.
   * @returns A function that takes the implementation out again; calling it twice does no harm.
   * @throws {FlashMLAError} With code `invalid-input` when the place is taken and `replace` is not set.
   */
  register(
    algorithm: string,
    platform: Platform,
    backend: Backend,
    implementation: Implementation,
    options: RegisterOptions = {},
  ): () => void {
    const { priority = 0, replace = false } = options;
    const added = { algorithm, platform: canonicalPlatform(platform), backend, priority, implementation };
    const taken = this.#registrations.findIndex((other) =>
      other.algorithm === algorithm && other.platform === added.platform && other.backend === backend &&
      other.priority === priority
    );
    if (taken < 0) {
      this.#registrations.push(added);
    } else if (replace) {
      this.#registrations[taken] = added;
    } else {
      throw new FlashMLAError(
        "invalid-input",
        `Cannot register "${algorithm}" for ${place(added)} with priority ${priority}: one is registered already; ` +
          "give another priority or set replace",
      );
    }
    return () => {
      const index = this.#registrations.indexOf(added);
      if (index >= 0) this.#registrations.splice(index, 1);
    };
  }

  /**
   * Finds the implementation to run: the highest priority first, then one for exactly this backend before one for `any`,
   * then the one registered first.
   *
   * @param algorithm Operation name.
   * @param query The platform and the backend at hand.
   * @returns The implementation.
   * @throws {FlashMLAError} With code `unsupported-platform`, listing what is registered.
   */
  get(algorithm: string, query: ImplementationQuery = {}): Implementation {
    const { platform, backend = Backend.ANY } = query;
    const exact = (found: Registration<Implementation>) => backend === Backend.ANY || found.backend === backend ? 0 : 1;
    const [best] = this.#of(algorithm)
      .filter((found) => platform === undefined || found.platform === canonicalPlatform(platform))
      .filter((found) => backend === Backend.ANY || found.backend === Backend.ANY || found.backend === backend)
      .sort((a, b) => b.priority - a.priority || exact(a) - exact(b));
    if (best !== undefined) return best.implementation;
    const where = platform === undefined ? "" : ` on platform "${platform}"`;
    const processor = backend === Backend.ANY ? "" : ` with backend "${backend}"`;
    throw new FlashMLAError(
      "unsupported-platform",
      `Cannot run "${algorithm}"${where}${processor}: ${this.#inventory(algorithm)}`,
    );
  }

  /**
   * Names every algorithm that has an implementation.
   *
   * @returns The names, in the order in which they were first registered.
   */
  listAlgorithms(): string[] {
    return [...new Set(this.#registrations.map((registration) => registration.algorithm))];
  }

  /**
   * Lists what is registered; an implementation for `reference` is listed a second time as `xla`.
   *
   * @param algorithm Operation name; every algorithm when absent.
   * @returns The registrations, in order.
   */
  listImplementations(algorithm?: string): Registration<Implementation>[] {
    const listed = algorithm === undefined ? this.#registrations : this.#of(algorithm);
    return listed.flatMap((found) =>
      found.platform === Platform.REFERENCE ? [{ ...found }, { ...found, platform: Platform.XLA }] : [{ ...found }]
    );
  }

  #of(algorithm: string): Registration<Implementation>[] {
    return this.#registrations.filter((registration) => registration.algorithm === algorithm);
  }

  #inventory(algorithm: string): string {
    const places = [...new Set(this.#of(algorithm).map(place))];
    if (places.length > 0) return `registered are ${places.join(", ")}`;
    const algorithms = this.listAlgorithms();
    return algorithms.length === 0
      ? "nothing is registered"
      : `no such algorithm; registered are ${algorithms.join(", ")}`;
  }
}

function place({ platform, backend }: { readonly platform: Platform; readonly backend: Backend }): string {
  return `${platform === Platform.REFERENCE ? "reference = xla" : platform} (${backend})`;
}
