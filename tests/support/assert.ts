// A typed face for the standard library's assertions, which reach us as untyped JavaScript from npm:
// the JSR registry is not reachable from every machine. Where it is, map "@std/assert" to "jsr:@std/assert@1" instead.

// @ts-types="./assert_types.d.ts"
export * from "std-assert-untyped";
