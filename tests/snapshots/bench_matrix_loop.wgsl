enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;
diagnostic(off, chromium.subgroup_matrix_uniformity);
diagnostic(off, subgroup_uniformity);
@group(0) @binding(0) var<storage, read_write> sink: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>, 1024>;
@group(0) @binding(2) var<uniform> iterations: vec4<u32>; // in x
var<workgroup> factors: array<vec4<u32>, 192>;
var<workgroup> product: array<vec4<f32>, 512>;

// Eight halves, rounded to nearest.
fn packHalves(low: vec4<f32>, high: vec4<f32>) -> vec4<u32> {
  return vec4<u32>(bitcast<vec2<u32>>(vec4<f16>(low)), bitcast<vec2<u32>>(vec4<f16>(high)));
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(local_invocation_index) t: u32) {
  let lane = t % 32u;
  let subgroup = t / 32u;
  if (t < 192u) {
    let quad = packHalves(inputs[2u * t] - 0.5, inputs[2u * t + 1u] - 0.5);
    factors[t] = quad;
  }
  workgroupBarrier();
  var left0_0: subgroup_matrix_left<f16, 16, 16>;
  var left1_0: subgroup_matrix_left<f16, 16, 16>;
  var sum0_0: subgroup_matrix_result<f32, 16, 16>;
  var sum0_1: subgroup_matrix_result<f32, 16, 16>;
  var sum0_2: subgroup_matrix_result<f32, 16, 16>;
  var sum0_3: subgroup_matrix_result<f32, 16, 16>;
  var sum1_0: subgroup_matrix_result<f32, 16, 16>;
  var sum1_1: subgroup_matrix_result<f32, 16, 16>;
  var sum1_2: subgroup_matrix_result<f32, 16, 16>;
  var sum1_3: subgroup_matrix_result<f32, 16, 16>;
  left0_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&factors, 0u, 2u);
  left1_0 = subgroupMatrixLoad<subgroup_matrix_left<f16, 16, 16>, row_major>(&factors, 32u, 2u);
  let right0 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&factors, 64u, 2u);
  let right1 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&factors, 96u, 2u);
  let right2 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&factors, 128u, 2u);
  let right3 = subgroupMatrixLoad<subgroup_matrix_right<f16, 16, 16>, row_major>(&factors, 160u, 2u);
  sum0_0 = subgroup_matrix_result<f32, 16, 16>();
  sum0_1 = subgroup_matrix_result<f32, 16, 16>();
  sum0_2 = subgroup_matrix_result<f32, 16, 16>();
  sum0_3 = subgroup_matrix_result<f32, 16, 16>();
  sum1_0 = subgroup_matrix_result<f32, 16, 16>();
  sum1_1 = subgroup_matrix_result<f32, 16, 16>();
  sum1_2 = subgroup_matrix_result<f32, 16, 16>();
  sum1_3 = subgroup_matrix_result<f32, 16, 16>();
  for (var i = 0u; i < iterations.x; i += 1u) {
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
    sum0_0 = subgroupMatrixMultiplyAccumulate(left0_0, right0, sum0_0);
    sum0_1 = subgroupMatrixMultiplyAccumulate(left0_0, right1, sum0_1);
    sum0_2 = subgroupMatrixMultiplyAccumulate(left0_0, right2, sum0_2);
    sum0_3 = subgroupMatrixMultiplyAccumulate(left0_0, right3, sum0_3);
    sum1_0 = subgroupMatrixMultiplyAccumulate(left1_0, right0, sum1_0);
    sum1_1 = subgroupMatrixMultiplyAccumulate(left1_0, right1, sum1_1);
    sum1_2 = subgroupMatrixMultiplyAccumulate(left1_0, right2, sum1_2);
    sum1_3 = subgroupMatrixMultiplyAccumulate(left1_0, right3, sum1_3);
  }
  var total = vec4<f32>();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum0_0, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum0_1, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum0_2, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum0_3, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum1_0, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum1_1, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum1_2, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  subgroupMatrixStore<row_major>(&product, subgroup * 64u, sum1_3, 4u);
  workgroupBarrier();
  total += product[subgroup * 64u + 2u * lane];
  total += product[subgroup * 64u + 2u * lane + 1u];
  workgroupBarrier();
  sink[id.x] = total;
}
