// Attended latents multiplied by the value weights, each head's by its own.
//
//   out[t, h, v] = Σ_l o[t, h, l] · wVc[l, g, v]      g = ⌊h / headsPerKvHead⌋
//
//   tile: see head_product.ts

import { resultQuads, type RowStorage } from "./absorbed_operands.ts";
import { headProduct } from "./head_product.ts";
import { type PackedElements, packedLoad, packedType } from "./packed_element.ts";

/** What of a call the generated WGSL depends on. */
export interface ProjectOutputShape {
  /** How attended latents are stored. */
  readonly attended: RowStorage;
  /** wVc as it is stored. */
  readonly weight: PackedElements;
  /** How results are to be stored; halves only where V is a multiple of 4. */
  readonly result: RowStorage;
  /** L. */
  readonly kvLoraRank: number;
  /** V. */
  readonly vHeadDim: number;
}

/** Index of each operand's binding. */
export const projectOutputBindings = { attended: 1, weight: 2, output: 3 } as const;

/** WGSL of the parameter block: words in this order. */
export const projectOutputParams = `struct Params {
  tokens: u32,
  heads: u32,
  kvHeads: u32,
  weightBase: u32,
  outputBase: u32, // elements from the binding's start to the first result
}`;

/** The kernel's source. Workgroups: columns along x, tokens along y, heads along z. */
export function wgsl({ attended, weight, result, kvLoraRank, vHeadDim }: ProjectOutputShape): string {
  const rows: PackedElements = { storage: attended, quads: true };
  const store = result === "halves"
    ? `    if (token >= params.tokens || column >= V) { continue; }
    output[(params.outputBase + (token * params.heads + head) * V + column) / 4u] =
      vec2<u32>(pack2x16float(sum.xy), pack2x16float(sum.zw));`
    : `    if (token >= params.tokens) { continue; }
    for (var c = 0u; c < 4u && column + c < V; c += 1u) {
      output[params.outputBase + (token * params.heads + head) * V + column + c] = sum[c];
    }`;
  return `// Results of absorbed attention.
const DEPTH = ${kvLoraRank}u;
const V = ${vHeadDim}u;

${projectOutputParams}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> attended: array<${packedType(rows)}>;
@group(0) @binding(2) var<storage, read> weight: array<${packedType(weight)}>;
@group(0) @binding(3) var<storage, read_write> output: array<${result === "halves" ? "vec2<u32>" : "f32"}>;

${packedLoad("attended", rows)}
${packedLoad("weight", weight)}

// What lies past the last token or column is another one's, and is not stored; past the depth there are zeros.
fn tile(token: u32, head: u32, k: u32) -> vec4<f32> {
  let quad = load_attended((min(token, params.tokens - 1u) * params.heads + head) * ${
    resultQuads({ kvLoraRank }) * 4
  }u, k, ${resultQuads({ kvLoraRank }) * 4}u);
  return select(vec4<f32>(), quad, vec4<u32>(k, k + 1u, k + 2u, k + 3u) < vec4<u32>(DEPTH));
}

fn weights(kvHead: u32, k: u32, n: u32) -> vec4<f32> {
  let quad = load_weight(params.weightBase + (min(k, DEPTH - 1u) * params.kvHeads + kvHead) * V, n, V);
  return select(vec4<f32>(), quad, k < DEPTH);
}

${
    headProduct({
      left: (token, k) => `tile(${token}, head, ${k})`,
      weight: (k, n) => `weights(kvHead, ${k}, ${n})`,
      weightAlongDepth: false,
      prologue: "  let kvHead = head * params.kvHeads / params.heads;",
      store,
    })
  }`;
}
