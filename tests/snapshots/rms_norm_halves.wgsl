// RMSNorm of parts of rows, in place, the first part into rows of halves.
enable f16;
struct Part {
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
@group(0) @binding(3) var<storage, read_write> normed: array<f16>;

var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(128)
fn main(
  @builtin(workgroup_id) workgroup: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) t: u32,
) {
  let part = params.parts[workgroup.y];
  for (var row = workgroup.x; row < params.rows; row += groups.x) {
    let start = row * params.row + part.first;
    var squares = 0.0;
    for (var i = t; i < part.width; i += 128u) { squares = fma(rows[start + i], rows[start + i], squares); }
    sums[t] = squares;
    workgroupBarrier();
    for (var half = 64u; half > 0u; half /= 2u) {
      if (t < half) { sums[t] += sums[t + half]; }
      workgroupBarrier();
    }
    let factor = inverseSqrt(sums[0] / f32(part.width) + params.epsilon);
    if (workgroup.y == 0u) {
      for (var i = t; i < part.width; i += 128u) {
        let value = rows[start + i] * factor * weight[part.weight + i];
        // NaN passes: clamp() may swallow it.
        normed[row * part.width + i] = f16(select(clamp(value, -65504.0, 65504.0), value, value != value));
      }
    } else {
      for (var i = t; i < part.width; i += 128u) { rows[start + i] *= factor * weight[part.weight + i]; }
    }
    // The sums are used again.
    workgroupBarrier();
  }
}
