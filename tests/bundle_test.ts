// The library as one module for browsers.

import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assertEquals, assertMatch } from "@std/assert";
import * as library from "../mod.ts";
import { imports } from "../tools/bundle_imports.ts";

const deno = (globalThis as { Deno?: { execPath(): string } }).Deno?.execPath();

test("deno task bundle writes one module that exports what mod.ts does, imports nothing, and works", {
  skip: deno === undefined ? "needs Deno" : false,
}, async () => {
  const cwd = fileURLToPath(new URL("..", import.meta.url));
  const said = execFileSync(deno!, ["task", "--quiet", "bundle"], {
    cwd,
    encoding: "utf8",
    stdio: ["ignore", "pipe", "pipe"],
  });
  assertMatch(said, /^dist\/flash-mla\.browser\.js {2}[\d.]+ kB minified \([\d.]+ kB gzip\), [\d.]+ kB as it is/);
  const file = new URL("../dist/flash-mla.browser.js", import.meta.url);
  assertEquals(imports(readFileSync(file, "utf8")), []);

  const bundled: typeof library = await import(file.href);
  assertEquals(Object.keys(bundled).sort(), Object.keys(library).sort());
  const ones = (...shape: number[]) => bundled.tensor(new Float32Array(shape.reduce((a, b) => a * b)).fill(1), shape);
  const { data } = await bundled.mlaAttention(
    { query: ones(1, 2, 1, 4), keyValue: ones(1, 2, 3), wKc: ones(3, 1, 4), wVc: ones(3, 1, 2) },
    { platform: "reference" },
  );
  assertEquals([...data], [3, 3, 3, 3]);
});

test("imports() finds what a bundle imports by name", () => {
  const code =
    'import"node:fs";import a from "b";export*from\'c\';await import( "d");await import(name);const from="e";';
  assertEquals(imports(code), ["node:fs", "b", "c", "d"]);
});
