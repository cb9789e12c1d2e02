// A product of each head's rows with a weight of that head: the tile of absorption, before and after attention.
//
//   out[m, n] = Σ_k left[m, k] · weight[k, n]          m: tokens of one head    k: depth    n: columns
//
//   one workgroup = one head × 16 tokens × 64 columns, 64 invocations of 4 × 4 sums
//   workgroup memory: 32 · (16 + 64) floats = 10 KiB. Decoding has few tokens: what counts is that each weight is read once
//   for sixteen of them, and that heads and columns make enough workgroups to draw on the memory.

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
 * @param load WGSL statements that set `quad`, a vec4<f32>: `left(row, k)` four neighbours along k of token `row`.
 * @param weightAlongDepth Whether four neighbours in a weight are neighbours along k, rather than along n.
 * @param store WGSL statements over `token`, `head`, `column` (a multiple of 4) and `sum`, a vec4<f32>.
 */
export function headProduct(
  { left, weight, weightAlongDepth, prologue = "", store }: {
    /** WGSL expression: left[token, k … k + 3] of `head`, zeros from the depth on. */
    readonly left: (token: string, k: string) => string;
    /** WGSL expression: four neighbours of the weight that begin at k and n. */
    readonly weight: (k: string, n: string) => string;
    readonly weightAlongDepth: boolean;
    readonly prologue?: string;
    readonly store: string;
  },
): string {
  const weightPiece = weightAlongDepth
    ? `let n = piece / ${depth / 4}u;
      let k = piece % ${depth / 4}u * 4u;
      let quad = ${weight("base + k", "firstColumn + n")};
      for (var i = 0u; i < 4u; i += 1u) { right[k + i][n / 4u][n % 4u] = quad[i]; }`
    : `let k = piece / ${productColumns / 4}u;
      let n = piece % ${productColumns / 4}u;
      right[k][n] = ${weight("base + k", "firstColumn + 4u * n")};`;
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
    for (var piece = t; piece < ${productTokens * depth / 4}u; piece += ${productSize}u) {
      let m = piece / ${depth / 4}u;
      let k = piece % ${depth / 4}u * 4u;
      let quad = ${left("firstToken + m", "base + k")};
      for (var i = 0u; i < 4u; i += 1u) { rows[k + i][m / 4u][m % 4u] = quad[i]; }
    }
    for (var piece = t; piece < ${productColumns * depth / 4}u; piece += ${productSize}u) {
      ${weightPiece}
    }
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
