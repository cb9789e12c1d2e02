// The standard library's assertions, as npm has them: untyped, hence the declarations beside this file. The JSR registry
// is not reachable from every machine; where it is, map "@std/assert" to "jsr:@std/assert@1" instead.

// @ts-self-types="./assert.d.ts"
export * from "deno-std/assert/mod.js";
