// What surrounds the library: the runtime it runs in, and environment variables, read without ever prompting: under Deno
// only where the permission is already granted.

interface Host {
  readonly Deno?: {
    readonly version: { readonly deno: string };
    readonly env: { get(name: string): string | undefined };
    readonly permissions: { querySync(descriptor: { name: "env"; variable: string }): { readonly state: string } };
    cwd(): string;
  };
  readonly Bun?: { readonly version: string };
  readonly process?: {
    readonly env?: Record<string, string | undefined>;
    readonly release?: { readonly name?: string };
    readonly versions?: { readonly node?: string };
    cwd?(): string;
  };
}

/** What runs this program. */
export interface Runtime {
  /** Its kind. */
  readonly name: "Deno" | "Bun" | "Node" | "browser";
  /** Its version; empty in browsers, whose WebGPU names it. */
  readonly version: string;
}

/** The runtime of this program. */
export function currentRuntime(): Runtime {
  const { Deno, Bun, process } = globalThis as Host;
  // Deno and Bun have Node's `process` too, so they go first.
  if (Deno !== undefined) return { name: "Deno", version: Deno.version.deno };
  if (Bun !== undefined) return { name: "Bun", version: Bun.version };
  if (process?.release?.name === "node") return { name: "Node", version: process.versions?.node ?? "" };
  return { name: "browser", version: "" };
}

/**
 * Reads one environment variable.
 *
 * @param name The variable's name.
 * @returns Its value, or undefined when it is unset, unreadable or the runtime has no environment.
 */
export function readEnvironment(name: string): string | undefined {
  const host = globalThis as Host;
  try {
    if (host.Deno !== undefined) {
      const { state } = host.Deno.permissions.querySync({ name: "env", variable: name });
      return state === "granted" ? host.Deno.env.get(name) : undefined;
    }
    return host.process?.env?.[name];
  } catch {
    return undefined;
  }
}

/** The directory that relative paths start from; empty where there is none. */
export function workingDirectory(): string {
  const host = globalThis as Host;
  return host.Deno?.cwd() ?? host.process?.cwd?.() ?? "";
}
