// New rows of a cache of latents.
struct Params {
  rows: u32,
  width: u32,      // of a row
  quads: u32,      // of four elements, of a row of the cache
  length: u32,     // rows of a batch item
  base: u32,       // elements from the binding's start to the first row, and from one item and row to the next
  item: u32,
  row: u32,
  firstPlace: u32, // the rows of the cache that this buffer holds
  placeCount: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> source: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> places: array<u32>;
@group(0) @binding(3) var<storage, read_write> cache: array<vec4<f32>>;

fn load_source(at: u32, column: u32, width: u32) -> vec4<f32> {
  let quad = source[(at + min(column, width - 4u)) / 4u];
  return select(vec4<f32>(), quad, column < width);
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.rows * params.quads; i += groups.x * 64u) {
    let row = i / params.quads;
    let column = i % params.quads * 4u;
    let place = places[row];
    // Wraps around for places before this buffer's, and for rows that have none.
    if (place == 4294967295u || place - params.firstPlace >= params.placeCount) { continue; }
    let at = params.base + row / params.length * params.item + row % params.length * params.row;
    let quad = load_source(at, column, params.width);
    cache[(place - params.firstPlace) * params.quads + column / 4u] = quad;
  }
}
