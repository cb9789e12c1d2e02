import { Scope } from "./scope.ts";

/**
 * What an overlay holds: one configuration for every call, or a map from a call key, an operation with its version
 * (`flash_mla@1`) or an operation's name (`flash_mla`) to a configuration. The most specific key wins.
 */
export type OverlayEntries<Cfg> = Cfg | ReadonlyMap<string, Cfg>;

const overlays = new Scope<OverlayEntries<unknown>>();

/**
 * Puts configurations in front of the memory and persistent caches until the handle is disposed. Overlays nest: the
 * innermost that has an entry for a call decides, and one without passes the call on outwards.
 *
 * The block form also covers the function that called this one, until the block ends, if nothing was awaited before:
 * use the callback form where calls overlap. In browsers, which cannot tell asynchronous calls apart, either form
 * covers every call that starts while the overlay is open.
 *
 * @example
 * ```ts ignore
 * using _ = overlayCache(cfg);
 * await mlaAttention(inputs);
 * ```
 *
 * @param entries The configurations.
 * @returns The handle, for `using`.
 */
export function overlayCache<Cfg extends object>(entries: OverlayEntries<Cfg>): Disposable;
/**
 * Puts configurations in front of the memory and persistent caches for the calls that a function makes.
 *
 * @example
 * ```ts ignore
 * const output = await overlayCache(cfg, () => mlaAttention(inputs));
 * ```
 *
 * @param entries The configurations.
 * @param fn What to run. The overlay ends when the promise that it returns settles.
 * @returns What `fn` returns.
 */
export function overlayCache<Cfg extends object, R>(entries: OverlayEntries<Cfg>, fn: () => R): R;
export function overlayCache<R>(entries: OverlayEntries<unknown>, fn?: () => R): Disposable | R {
  // A copy: what the caller does to the map afterwards does not reach into a scope that is open.
  const held = entries instanceof Map ? new Map(entries) : entries;
  return fn === undefined ? overlays.enter(held) : overlays.run(held, fn);
}

/**
 * The overlays in scope. A call reads them before its first `await`, while they are sure to be open.
 *
 * @returns What they hold, innermost first.
 */
export function openOverlays(): readonly OverlayEntries<unknown>[] {
  return overlays.values();
}

/**
 * The configuration that overlays hold for a call.
 *
 * @param op Operation and version, such as `flash_mla@1`.
 * @param callKey The call key.
 * @param open The overlays to ask, innermost first. Default: those in scope.
 * @returns The first overlay's entry, or undefined. It is what the user passed in, unchecked.
 */
export function overlayLookup<Cfg>(
  op: string,
  callKey: string,
  open: readonly OverlayEntries<unknown>[] = openOverlays(),
): Cfg | undefined {
  const name = op.slice(0, op.lastIndexOf("@") < 0 ? op.length : op.lastIndexOf("@"));
  for (const entries of open) {
    const cfg = entries instanceof Map ? entries.get(callKey) ?? entries.get(op) ?? entries.get(name) : entries;
    if (cfg !== undefined) return cfg as Cfg;
  }
  return undefined;
}
