// Workgroup variables of a kernel, by its source.

import { assert } from "@std/assert";

const scalars: Readonly<Record<string, number>> = { f16: 2, f32: 4, i32: 4, u32: 4 };

/** Bytes of a WGSL type of the kinds that kernels keep in workgroup memory. */
function sizeOf(type: string): number {
  const scalar = scalars[type];
  if (scalar !== undefined) return scalar;
  const [, count, element] = /^vec([24])<(\w+)>$/.exec(type) ?? [];
  if (count !== undefined) return Number(count) * sizeOf(element);
  const [, inner, length] = /^array<(.+), (\d+)>$/.exec(type) ?? [];
  assert(inner !== undefined, `a type that is not known here: ${type}`);
  return sizeOf(inner) * Number(length);
}

/** Bytes of each workgroup variable. */
export function workgroupVariables(code: string): Map<string, number> {
  const found = code.matchAll(/var<workgroup> (\w+): ([^;]+);/g);
  return new Map([...found].map(([, name, type]) => [name, sizeOf(type.replaceAll(/\s+/g, " "))]));
}

/** Bytes of all of them. */
export function workgroupTotal(code: string): number {
  return [...workgroupVariables(code).values()].reduce((sum, bytes) => sum + bytes, 0);
}
