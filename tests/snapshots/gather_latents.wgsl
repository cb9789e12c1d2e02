// Rows of a cache, gathered.
struct Params {
  rows: u32,
  quads: u32,      // of four elements, of a row
  firstPlace: u32, // the rows of the cache that this buffer holds
  placeCount: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> places: array<u32>;
@group(0) @binding(2) var<storage, read> cache: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> gathered: array<vec2<u32>>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.rows * params.quads; i += groups.x * 64u) {
    let place = places[i / params.quads];
    if (place == 4294967295u || place - params.firstPlace >= params.placeCount) { continue; }
    gathered[i] = cache[(place - params.firstPlace) * params.quads + i % params.quads];
  }
}
