// Places of rows.
struct Params {
  rows: u32,
  maxPages: u32,
  pages: u32,
  tableBase: u32, // words from each binding's start to its first element
  lensBase: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<vec2<u32>>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> lens: array<u32>;
@group(0) @binding(4) var<storage, read_write> places: array<u32>;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < params.rows; i += groups.x * 64u) {
    let row = rows[i];
    let key = lens[params.lensBase + row.x] + row.y;
    let column = key / 64u;
    var place = 4294967295u;
    if (column < params.maxPages) {
      let page = pages[params.tableBase + row.x * params.maxPages + column];
      if (page < params.pages) { place = page * 64u + key % 64u; }
    }
    places[i] = place;
  }
}
