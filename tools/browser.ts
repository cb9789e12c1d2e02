// Serves examples/browser on this machine, bundled afresh.
//
//   deno task browser               on the usual port, or on a free one where that is taken
//   deno task browser --port 8000   on this one; 0 takes a free one

import { bundleForBrowsers } from "./browser_bundle.ts";

/** Fixed, because browsers keep what they remember by address: configurations are found again on the next start. */
const usualPort = 8629;

const sources = new URL("../examples/browser/", import.meta.url);
const bundles = new URL("../dist/browser/", import.meta.url);
const files: Record<string, readonly [file: URL, type: string]> = {
  "/": [new URL("index.html", sources), "text/html"],
  "/page.css": [new URL("page.css", sources), "text/css"],
  "/main.js": [new URL("main.js", bundles), "text/javascript"],
  "/oracle_worker.js": [new URL("oracle_worker.js", bundles), "text/javascript"],
};

await bundleForBrowsers([new URL("main.ts", sources), new URL("oracle_worker.ts", sources)], { folder: bundles });
const asked = portAsked(Deno.args);
try {
  listen(asked ?? usualPort);
} catch (error) {
  if (asked !== undefined || !(error instanceof Deno.errors.AddrInUse)) throw error;
  listen(0);
}

function listen(port: number): void {
  const onListen = ({ port }: Deno.NetAddr) => console.log(`http://localhost:${port}/`);
  Deno.serve({ hostname: "127.0.0.1", port, onListen }, async (request) => {
    const found = files[new URL(request.url).pathname];
    if (found === undefined) return new Response("Not found", { status: 404 });
    const [file, type] = found;
    const headers = { "content-type": `${type}; charset=utf-8`, "cache-control": "no-store" };
    return new Response(await Deno.readFile(file), { headers });
  });
}

function portAsked(args: readonly string[]): number | undefined {
  const at = args.findIndex((argument) => argument === "--port" || argument.startsWith("--port="));
  if (at < 0) return undefined;
  const value = args[at].split("=")[1] ?? args[at + 1];
  const port = Number(value);
  if (/^\d+$/.test(value ?? "") && port < 65536) return port;
  console.error(`--port must be a number from 0 to 65535, got ${value}`);
  Deno.exit(2);
}
