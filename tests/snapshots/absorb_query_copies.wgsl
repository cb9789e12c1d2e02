// Absorbed queries.
const DEPTH = 0u;
const L = 7u;
const WIDTH = 12u; // of a row of the result

struct Params {
  tokens: u32,
  queryLength: u32, // tokens of a batch item
  heads: u32,
  kvHeads: u32,
  base: u32,        // elements from the binding's start to the first query, and from one item, token and head to the next
  item: u32,
  row: u32,
  head: u32,
  weightBase: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> query: array<u32>;

@group(0) @binding(3) var<storage, read_write> rows_out: array<vec4<f32>>;

fn load_query(at: u32, column: u32, width: u32) -> vec4<f32> {
  var quad = vec4<f32>();
  for (var c = 0u; c < 4u && column + c < width; c += 1u) {
    let i = at + column + c;
    quad[c] = unpack2x16float(query[i / 2u])[i % 2u];
  }
  return quad;
}



fn queryAt(token: u32, head: u32) -> u32 {
  return params.base + token / params.queryLength * params.item + token % params.queryLength * params.row + head * params.head;
}

// One element: columns past what was multiplied begin at any place of a row.
fn element(at: u32, column: u32, end: u32) -> f32 {
  return load_query(at, column / 4u * 4u, end)[column % 4u];
}

fn store(token: u32, head: u32, column: u32, value: vec4<f32>) {
  let at = ((token * params.heads + head) * WIDTH + column) / 4u;
  rows_out[at] = value;
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  let count = params.tokens * params.heads * (WIDTH / 4u);
  for (var i = id.x; i < count; i += groups.x * 64u) {
    let column = i % (WIDTH / 4u) * 4u;
    let row = i / (WIDTH / 4u);
    let at = queryAt(row / params.heads, row % params.heads);
    store(row / params.heads, row % params.heads, column, load_query(at, column, 9u));
  }
}
