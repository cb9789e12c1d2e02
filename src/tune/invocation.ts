import type { CacheKey } from "../cache/cache_record.ts";

/** What identifies a call: everything that decides which configuration is best, and nothing of the values. */
export interface InvocationInit<Call> {
  /** Operation name, such as `flash_mla`. */
  readonly opId: string;
  /** Version of the operation's kernels. */
  readonly version: string;
  /** The call itself: tensors and options. */
  readonly call: Call;
  /** Fingerprint of the device that will run it. */
  readonly device: string;
  /** Exact shapes, dtypes and options: any JSON value. Object keys are sorted before hashing. */
  readonly signature: unknown;
  /** The same with lengths rounded up to powers of two, as one readable string. */
  readonly bucket: string;
}

/** How the configurations of a call are measured, as far as it decides which one wins. */
export interface MeasuringOptions {
  /** Whether an operation that has gradients is measured without them. Default `false`. */
  readonly forwardOnly?: boolean;
}

/** One call of an operation, with the keys under which its configuration is looked up. */
export class Invocation<Call> {
  /** Operation name. */
  readonly opId: string;
  /** Version of the operation's kernels. */
  readonly version: string;
  /** The call itself. */
  readonly call: Call;
  /** Fingerprint of the device that will run it. */
  readonly device: string;
  /** Exact shapes, dtypes and options. */
  readonly signature: unknown;
  /** Bucketed shapes, dtypes and options. */
  readonly bucket: string;

  /**
   * Describes a call.
   *
   * @param init What identifies the call.
   */
  constructor(init: InvocationInit<Call>) {
    this.opId = init.opId;
    this.version = init.version;
    this.call = init.call;
    this.device = init.device;
    this.signature = init.signature;
    this.bucket = init.bucket;
  }

  /** Operation and version in one string, such as `flash_mla@1`. */
  get op(): string {
    return `${this.opId}@${this.version}`;
  }

  /**
   * The call key: equal for two calls with the same shapes, dtypes and options, whatever their values.
   *
   * @returns 16 lower-case hex digits, the head of a SHA-256.
   */
  callKey(): Promise<string> {
    return hashJson([this.op, this.signature]);
  }

  /**
   * The key that configurations are cached under.
   *
   * @param candidates The configurations that would be measured on a miss.
   * @param options How they would be measured.
   * @returns The key's parts.
   */
  async cacheKey(candidates: readonly unknown[], options: MeasuringOptions = {}): Promise<CacheKey> {
    const bucket = options.forwardOnly ? `${this.bucket}, forward only` : this.bucket;
    return { op: this.op, device: this.device, bucket, candidates: await hashJson(candidates) };
  }
}

const hashes = new Map<string, Promise<string>>();

/**
 * The first 16 hex digits of the SHA-256 of a JSON value, object keys sorted; of a simpler hash where there is no
 * SubtleCrypto. Remembered, since calls repeat.
 */
export function hashJson(value: unknown): Promise<string> {
  // Sorting takes longer than looking it up: the same call writes its keys in the same order.
  const text = JSON.stringify(value);
  let hash = hashes.get(text);
  if (hash === undefined) {
    if (hashes.size >= 4096) hashes.clear();
    hashes.set(text, hash = sha256Head(JSON.stringify(value, sortKeys)));
  }
  return hash;
}

async function sha256Head(text: string): Promise<string> {
  if (globalThis.crypto?.subtle === undefined) return fnv1a(text);
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return Array.from(new Uint8Array(digest, 0, 8), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** For pages from plain http, which have no SubtleCrypto; they have no WebGPU either, so nothing measured has such a key. */
function fnv1a(text: string): string {
  let hash = 0xcbf29ce484222325n;
  for (const byte of new TextEncoder().encode(text)) {
    hash = BigInt.asUintN(64, (hash ^ BigInt(byte)) * 0x100000001b3n);
  }
  return hash.toString(16).padStart(16, "0");
}

function sortKeys(_key: string, value: unknown): unknown {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return value;
  return Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1)));
}
