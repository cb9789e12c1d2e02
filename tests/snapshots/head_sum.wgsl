// Strided rows, summed over heads.
struct Params {
  rows: u32,
  slots: u32,
  heads: u32,
  columns: u32,
  fromBase: u32,  // elements from the binding's start to the first row, from one row to the next, and so on
  fromRow: u32,
  fromSlot: u32,
  fromHead: u32,
  itemRows: u32,  // rows of a batch item …
  fromGap: u32,   // … and further elements from one item to the next, modulo 2^32
  intoBase: u32,
  intoRow: u32,
  intoSlot: u32,
  accumulate: u32, // whether to add to what is there
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<f32>;
@group(0) @binding(2) var<storage, read_write> sums: array<f32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.rows * params.slots * params.columns;
  for (var i = id.x; i < count; i += groups.x * 64u) {
    let column = i % params.columns;
    let slot = (i / params.columns) % params.slots;
    let row = i / (params.columns * params.slots);
    let at = params.fromBase + row * params.fromRow + slot * params.fromSlot + row / params.itemRows * params.fromGap + column;
    let into = params.intoBase + row * params.intoRow + slot * params.intoSlot + column;
    var sum = 0.0;
    if (params.accumulate != 0u) { sum = sums[into]; }
    for (var head = 0u; head < params.heads; head += 1u) { sum += f32(rows[at + head * params.fromHead]); }
    sums[into] = sum;
  }
}
