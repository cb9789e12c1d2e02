// Environment variables, read without ever prompting: under Deno only where the permission is already granted.

interface ProcessLike {
  readonly env?: Record<string, string | undefined>;
}

/**
 * Reads one environment variable.
 *
 * @param name The variable's name.
 * @returns Its value, or undefined when it is unset, unreadable or the runtime has no environment.
 */
export function readEnvironment(name: string): string | undefined {
  try {
    if (typeof Deno !== "undefined") {
      const { state } = Deno.permissions.querySync({ name: "env", variable: name });
      return state === "granted" ? Deno.env.get(name) : undefined;
    }
    return (globalThis as { process?: ProcessLike }).process?.env?.[name];
  } catch {
    return undefined;
  }
}
