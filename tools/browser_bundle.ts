// Bundles modules for browsers with `deno bundle`, which is esbuild of the version that this Deno brings.

import { imports } from "./bundle_imports.ts";

/** How to bundle. */
export interface BundleOptions {
  /** Folder to write to; each module gets a .js file of its own name. */
  readonly folder: URL;
  /** Whether names and white space are shortened. Default false. */
  readonly minify?: boolean;
}

/**
 * Bundles modules, each with all that it imports.
 *
 * @param entries The modules.
 * @param options Where to.
 * @throws {Error} With what the bundler says, or when a bundle would import something that browsers do not have.
 */
export async function bundleForBrowsers(
  entries: readonly URL[],
  { folder, minify = false }: BundleOptions,
): Promise<void> {
  for (const entry of entries) {
    const output = new URL(entry.pathname.split("/").at(-1)!.replace(/\.ts$/, ".js"), folder);
    const flags = ["--quiet", "--platform=browser", "--format=esm", ...(minify ? ["--minify"] : [])];
    const { success, stderr } = await new Deno.Command(Deno.execPath(), {
      args: ["bundle", ...flags, "--output", fileOf(output), fileOf(entry)],
      env: { NO_COLOR: "1" },
      stdout: "null",
    }).output();
    if (!success) throw new Error(`Cannot bundle ${entry.pathname}: ${new TextDecoder().decode(stderr)}`);
    const left = imports(await Deno.readTextFile(output));
    if (left.length > 0) throw new Error(`Cannot bundle ${entry.pathname}: it imports ${left.join(", ")}`);
  }
}

function fileOf(url: URL): string {
  return decodeURIComponent(url.pathname).replace(/^\/([A-Za-z]:)/, "$1");
}
