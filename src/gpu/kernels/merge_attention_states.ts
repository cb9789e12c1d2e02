// Two partial results of attention over disjoint keys become the result over all of them.
//
//   m = max(lse_a, lse_b, sinks)     w_x = exp(lse_x − m)     Z = w_a + w_b + Σ_n exp(aux_n − m)
//   out = (w_a · out_a + w_b · out_b) / Z                     lse = m + log Z
//
//   one invocation = one element of the output, striding over the whole grid; column 0 also writes the row's lse
//
// Halves are unpacked from words, which core WGSL can do; the output is dense float32. A part that saw no key has lse −∞ and
// counts as absent, whatever stands in its output.

/** Invocations per workgroup. */
export const workgroupSize = 64;

/** What of a call the generated WGSL depends on. */
export interface MergeShape {
  /** Whether the first part's output is stored in halves. */
  readonly halvesA: boolean;
  /** Whether the second part's is. */
  readonly halvesB: boolean;
  /** Whether sinks join. */
  readonly sinks: boolean;
}

/** The kernel's source. Sinks come as base-2 logarithms of each head's sum; see sinks.ts. */
export function wgsl({ halvesA, halvesB, sinks }: MergeShape): string {
  const load = (part: "a" | "b", halves: boolean) =>
    `fn load_${part}(at: u32) -> f32 { ${
      halves ? `return unpack2x16float(out_${part}[at / 2u])[at % 2u];` : `return out_${part}[at];`
    } }`;
  const element = (halves: boolean) => halves ? "u32" : "f32";
  return `// Attention states over disjoint keys, merged.
struct Place {
  base: u32, // elements from the binding's start to the first one
  item: u32, // and from one batch item, query and head to the next
  row: u32,
  head: u32,
}

struct Params {
  minusInfinity: f32,
  batch: u32,
  queryLength: u32,
  queryHeads: u32,
  V: u32,
  pad0: u32,
  pad1: u32,
  pad2: u32,
  a: Place,
  b: Place,
  lseA: Place,
  lseB: Place,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> out_a: array<${element(halvesA)}>;
@group(0) @binding(2) var<storage, read> lse_a: array<f32>;
@group(0) @binding(3) var<storage, read> out_b: array<${element(halvesB)}>;
@group(0) @binding(4) var<storage, read> lse_b: array<f32>;
@group(0) @binding(5) var<storage, read_write> merged: array<f32>;
@group(0) @binding(6) var<storage, read_write> lse: array<f32>;
${sinks ? "@group(0) @binding(7) var<storage, read> sinkSums: array<f32>;" : ""}

const UNSEEN = -3.0e38;

${load("a", halvesA)}
${load("b", halvesB)}

fn at(place: Place, item: u32, row: u32, head: u32) -> u32 {
  return place.base + item * place.item + row * place.row + head * place.head;
}

@compute @workgroup_size(${workgroupSize})
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.batch * params.queryLength * params.queryHeads * params.V;
  for (var i = id.x; i < count; i += groups.x * ${workgroupSize}u) {
    let column = i % params.V;
    let head = (i / params.V) % params.queryHeads;
    let row = (i / (params.V * params.queryHeads)) % params.queryLength;
    let item = i / (params.V * params.queryHeads * params.queryLength);
    let sumA = lse_a[at(params.lseA, item, row, head)];
    let sumB = lse_b[at(params.lseB, item, row, head)];
    let seenA = !(sumA < UNSEEN);
    let seenB = !(sumB < UNSEEN);
    var top = max(select(UNSEEN, sumA, seenA), select(UNSEEN, sumB, seenB));
${sinks ? "    let sink = sinkSums[head] * 0.6931471805599453;\n    top = max(top, sink);" : ""}
    let weightA = select(0.0, exp(sumA - top), seenA);
    let weightB = select(0.0, exp(sumB - top), seenB);
    let total = weightA + weightB${sinks ? " + exp(sink - top)" : ""};
    let some = seenA || seenB;
    var value = 0.0;
    if (seenA) { value += weightA / total * load_a(at(params.a, item, row, head) + column); }
    if (seenB) { value += weightB / total * load_b(at(params.b, item, row, head) + column); }
    merged[i] = value;
    if (column == 0u) {
      lse[(item * params.queryHeads + head) * params.queryLength + row] =
        select(params.minusInfinity, top + log(total), some);
    }
  }
}
`;
}
