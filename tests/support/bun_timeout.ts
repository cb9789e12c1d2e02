// Bun gives a test 5 s, and bunfig.toml has no other number for it; a software adapter compiles one kernel for longer. The
// limit is set per file, from inside, so each test file is loaded with a first line that does so (no line moves).

import { readFileSync } from "node:fs";

interface Loaded {
  readonly loader: "ts";
  readonly contents: string;
}
interface Build {
  onLoad(files: { readonly filter: RegExp }, load: (file: { readonly path: string }) => Loaded): unknown;
}
const { Bun } = globalThis as unknown as { Bun: { plugin(of: { name: string; setup(build: Build): void }): void } };

const limit = 600_000;
const line = `import { setDefaultTimeout as setLimit } from "bun:test"; setLimit(${limit}); `;

Bun.plugin({
  name: "time for kernels to compile",
  setup: (build) => {
    build.onLoad(
      { filter: /_test\.ts$/ },
      ({ path }) => ({ loader: "ts", contents: line + readFileSync(path, "utf8") }),
    );
  },
});
