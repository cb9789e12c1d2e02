// A product of each head's rows with a weight of that head: the tile of absorption, before and after attention.
//
//   out[m, n] = Σ_k left[m, k] · weight[k, n]          m: tokens of one head    k: depth    n: columns
//
//   one workgroup = one head × 16 tokens × 64 columns, 64 invocations of 4 × 4 sums
//   workgroup memory: 32 · (16 + 64) floats = 10 KiB. Decoding has few tokens: what counts is that each weight is read once
//   for sixteen of them, and that heads and columns make enough workgroups to draw on the memory.

import { indent, unroll } from "./register_tile.ts";

/** Tokens of a workgroup. */
export const productTokens = 16;

/** Columns of a workgroup. */
export const productColumns = 64;

/** Invocations of a workgroup. */
export const productSize = 64;

const depth = 32;

/**
 * WGSL of the workgroup memory and of `main`.
 *
 * @param product What is multiplied, and where the sums go.
 */
export function headProduct(
  { left, weight, weightAlongDepth, prologue = "", store }: {
    /** WGSL expression: left[token, k … k + 3] of `head`, zeros from the depth on. */
    readonly left: (token: string, k: string) => string;
    /** WGSL expression: four neighbours of the weight that begin at k and n. */
    readonly weight: (k: string, n: string) => string;
    /** Whether those are neighbours along k, rather than along n. */
    readonly weightAlongDepth: boolean;
    /** WGSL statements before all. */
    readonly prologue?: string;
    /** WGSL statements over `token`, `head`, `column` (a multiple of 4) and `sum`, a vec4<f32>. */
    readonly store: string;
  },
): string {
  const leftPieces = unroll(
    productTokens * depth / 4 / productSize,
    (i) =>
      `let m${i} = (t + ${i * productSize}u) / ${depth / 4}u;
let k${i} = t % ${depth / 4}u * 4u;
let left${i} = ${left(`firstToken + m${i}`, `base + k${i}`)};`,
  );
  const rightPieces = unroll(productColumns * depth / 4 / productSize, (i) => {
    const piece = `(t + ${i * productSize}u)`;
    return weightAlongDepth
      ? `let right${i} = ${weight(`base + t % ${depth / 4}u * 4u`, `firstColumn + ${piece} / ${depth / 4}u`)};`
      : `let right${i} = ${
        weight(`base + ${piece} / ${productColumns / 4}u`, `firstColumn + 4u * (t % ${productColumns / 4}u)`)
      };`;
  });
  const storeLeft = unroll(
    productTokens * depth / 4 / productSize,
    (i) => unroll(4, (c) => `rows[k${i} + ${c}u][m${i} / 4u][m${i} % 4u] = left${i}[${c}];`),
  );
  const storeRight = unroll(productColumns * depth / 4 / productSize, (i) => {
    const piece = `(t + ${i * productSize}u)`;
    if (!weightAlongDepth) return `right[${piece} / ${productColumns / 4}u][t % ${productColumns / 4}u] = right${i};`;
    const n = `${piece} / ${depth / 4}u`;
    return unroll(4, (c) => `right[t % ${depth / 4}u * 4u + ${c}u][${n} / 4u][${n} % 4u] = right${i}[${c}];`);
  });
  return `var<workgroup> rows: array<array<vec4<f32>, ${productTokens / 4}>, ${depth}>;
var<workgroup> right: array<array<vec4<f32>, ${productColumns / 4}>, ${depth}>;

@compute @workgroup_size(${productSize})
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let head = workgroup.z;
  let firstColumn = workgroup.x * ${productColumns}u;
  let firstToken = workgroup.y * ${productTokens}u;
${prologue}
  let rowQuad = t / ${productColumns / 4}u;
  let columnQuad = t % ${productColumns / 4}u;
  var sums: array<vec4<f32>, 4>;
  for (var base = 0u; base < DEPTH; base += ${depth}u) {
    // All loads before the first store, so that a step waits for memory once.
${indent(leftPieces, 4)}
${indent(rightPieces, 4)}
${indent(storeLeft, 4)}
${indent(storeRight, 4)}
    workgroupBarrier();
    for (var k = 0u; k < ${depth}u; k += 1u) {
      let l = rows[k][rowQuad];
      let r = right[k][columnQuad];
      sums[0] += l.x * r;
      sums[1] += l.y * r;
      sums[2] += l.z * r;
      sums[3] += l.w * r;
    }
    workgroupBarrier();
  }
  let column = firstColumn + 4u * columnQuad;
  for (var i = 0u; i < 4u; i += 1u) {
    let token = firstToken + 4u * rowQuad + i;
    let sum = sums[i];
${store}
  }
}
`;
}
