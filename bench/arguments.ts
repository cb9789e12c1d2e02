// The command line of the benchmarks: `--name=value` and `--name`.

/**
 * The value of an option.
 *
 * @param name Its name without dashes.
 * @returns What stands behind the equals sign of its first occurrence; undefined when it is not given.
 */
export function argument(name: string): string | undefined {
  return Deno.args.find((given) => given.startsWith(`--${name}=`))?.slice(name.length + 3);
}

/** Whether a switch is given. */
export function flag(name: string): boolean {
  return Deno.args.includes(`--${name}`);
}
