// Compiles sources and tests for Node, which before version 22.18 runs no TypeScript, into .build/node.
//
//   deno run -A tools/build_for_node.ts && node --test .build/node/tests/

import { cpSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import packageJson from "../package.json" with { type: "json" };
import { type Ended, run } from "./child_process.ts";

/** Where the compiled project is, in the project's own layout. */
export const nodeFolder = ".build/node";

/** The compiled counterpart of a source file. */
export function compiled(path: string): string {
  return `${nodeFolder}/${path.replace(/\.ts$/, ".js")}`;
}

/** Compiles the project in the current directory; needs `node_modules`. */
export async function buildForNode(): Promise<Ended> {
  rmSync(nodeFolder, { recursive: true, force: true });
  const compiler = `npm:typescript@${packageJson.devDependencies.typescript}/bin/tsc`;
  const ended = await run(Deno.execPath(), ["run", "-A", compiler, "-p", "tsconfig.node.json"]);
  if (!ended.success) return ended;
  // What tests read by a URL relative to their own.
  cpSync("tests", `${nodeFolder}/tests`, { recursive: true, filter: (path) => !path.endsWith(".ts") });
  for (const file of ["deno.json", "package.json"]) cpSync(file, `${nodeFolder}/${file}`);
  // The compiler leaves bare specifiers as they are, whatever tsconfig.json maps them to.
  const assertions = `${nodeFolder}/node_modules/@std/assert`;
  mkdirSync(assertions, { recursive: true });
  writeFileSync(`${assertions}/package.json`, '{ "type": "module", "exports": "./index.js" }\n');
  writeFileSync(`${assertions}/index.js`, 'export * from "../../../tests/support/assert.js";\n');
  return ended;
}

if (import.meta.main) {
  Deno.chdir(new URL("..", import.meta.url));
  const { success, text, how } = await buildForNode();
  if (!success) console.error(`${text}\nThe compiler ${how}`);
  Deno.exit(success ? 0 : 1);
}
