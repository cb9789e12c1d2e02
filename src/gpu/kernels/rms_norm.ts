// Rows over their root mean square, times a weight, in place. A layer norms two parts of the same rows, the query's latent and
// the cached one, in one dispatch; the first may go to rows of halves of its own, as matrix units read them.
//
//   y[i] = x[i] / √(mean(x²) + ε) · weight[i]
//
//   one workgroup = one part of a row at a time, striding over the rows; 128 invocations
//   workgroup memory: 128 floats. Rows are some 512 to 1,536 wide: a few loads for each invocation, and one reduction.

/** Invocations of a workgroup. */
export const workgroupSize = 128;

/**
 * The kernel's source: bindings are the parameters, the weights of all parts, the rows, and with `halves` dense rows that take
 * the first part. Workgroups: rows, parts.
 */
export function wgsl({ halves }: { readonly halves: boolean }): string {
  return `// RMSNorm of parts of rows, in place${halves ? ", the first part into rows of halves" : ""}.
${halves ? "enable f16;\n" : ""}struct Part {
  first: u32,  // column
  width: u32,
  weight: u32, // index of its first weight
  pad: u32,
}

struct Params {
  parts: array<Part, 2>,
  rows: u32,
  row: u32, // elements from one row to the next
  epsilon: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weight: array<f32>;
@group(0) @binding(2) var<storage, read_write> rows: array<f32>;
${halves ? "@group(0) @binding(3) var<storage, read_write> normed: array<f16>;\n" : ""}
var<workgroup> sums: array<f32, ${workgroupSize}>;

@compute @workgroup_size(${workgroupSize})
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  let part = params.parts[workgroup.y];
  for (var row = workgroup.x; row < params.rows; row += groups.x) {
    let start = row * params.row + part.first;
    var squares = 0.0;
    for (var i = t; i < part.width; i += ${workgroupSize}u) { squares = fma(rows[start + i], rows[start + i], squares); }
    sums[t] = squares;
    workgroupBarrier();
    for (var half = ${workgroupSize / 2}u; half > 0u; half /= 2u) {
      if (t < half) { sums[t] += sums[t + half]; }
      workgroupBarrier();
    }
    let factor = inverseSqrt(sums[0] / f32(part.width) + params.epsilon);
    ${
    halves
      ? `if (workgroup.y == 0u) {
      for (var i = t; i < part.width; i += ${workgroupSize}u) {
        let value = rows[start + i] * factor * weight[part.weight + i];
        // NaN passes: clamp() may swallow it.
        normed[row * part.width + i] = f16(select(clamp(value, -65504.0, 65504.0), value, value != value));
      }
    } else {
      for (var i = t; i < part.width; i += ${workgroupSize}u) { rows[start + i] *= factor * weight[part.weight + i]; }
    }`
      : `for (var i = t; i < part.width; i += ${workgroupSize}u) { rows[start + i] *= factor * weight[part.weight + i]; }`
  }
    // The sums are used again.
    workgroupBarrier();
  }
}
`;
}
