// Writes the library as one module for browsers, dist/flash-mla.browser.js, and says how large it is.

import { bundleForBrowsers } from "./browser_bundle.ts";

const root = new URL("../", import.meta.url);
const folder = new URL("dist/", root);
const file = new URL("flash-mla.browser.js", folder);
const entry = new URL("mod.ts", root);

const size = (bytes: number) => `${(bytes / 1000).toFixed(1)} kB`;
const gzip = async (bytes: Uint8Array<ArrayBuffer>) =>
  (await new Response(new Blob([bytes]).stream().pipeThrough(new CompressionStream("gzip"))).bytes()).length;

const sizes: string[] = [];
for (const minify of [false, true]) {
  await bundleForBrowsers([entry], { folder, minify });
  const bytes = await Deno.readFile(new URL("mod.js", folder));
  sizes.push(`${size(bytes.length)} ${minify ? "minified" : "as it is"} (${size(await gzip(bytes))} gzip)`);
}
await Deno.rename(new URL("mod.js", folder), file);
console.log(`dist/flash-mla.browser.js  ${sizes.reverse().join(", ")}`);
