// Environment variables, read without ever prompting: under Deno only where the permission is already granted.

interface EnvironmentHost {
  readonly Deno?: {
    readonly env: { get(name: string): string | undefined };
    readonly permissions: { querySync(descriptor: { name: "env"; variable: string }): { readonly state: string } };
  };
  readonly process?: { readonly env?: Record<string, string | undefined> };
}

/**
 * Reads one environment variable.
 *
 * @param name The variable's name.
 * @returns Its value, or undefined when it is unset, unreadable or the runtime has no environment.
 */
export function readEnvironment(name: string): string | undefined {
  const host = globalThis as EnvironmentHost;
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
