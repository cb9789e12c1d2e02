import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch, assertNotEquals } from "@std/assert";
import { type Capabilities, describeCapabilities, deviceCapabilities, openDevice } from "../mod.ts";
import { capabilitiesOf, defaultLimits, deviceFingerprint } from "../src/gpu/capabilities.ts";
import { probe, type ProbeFindings } from "../src/gpu/capability_probe.ts";
import { gpuContext } from "../src/gpu/device.ts";
import { type Engine, engineOf, findGpu } from "../src/gpu/engine.ts";
import { skip } from "./support/gpu.ts";

const engine: Engine = { name: "engine 1", subgroupsDirective: true, graphicsApi: "" };
const findings: ProbeFindings = {
  computes: true,
  f16: true,
  matrixUnits: null,
  subgroupSizes: [32],
  ticks: [1001n, 2003n],
};

/** The capabilities of a device that says this of itself and whose kernels did that. */
function described(info: Record<string, unknown>, found: Partial<ProbeFindings> = {}, features: string[] = []) {
  const device = { limits: defaultLimits, features: new Set(features), adapterInfo: info } as unknown as GPUDevice;
  return capabilitiesOf(device, engine, { ...findings, ...found });
}

const capabilities: Capabilities = described({ description: "card" });

describe("capabilitiesOf()", () => {
  test("takes subgroup sizes from the engine where they hold what was seen", () => {
    const info = { subgroupMinSize: 8, subgroupMaxSize: 32 };
    assertEquals(described(info, { subgroupSizes: [16] }).subgroups, { minSize: 8, maxSize: 32, directive: true });
  });

  const seen = {
    "says nothing": {},
    "says all that is allowed": { subgroupMinSize: 4, subgroupMaxSize: 128 },
    "says zero": { subgroupMinSize: 0, subgroupMaxSize: 0 },
    "is contradicted": { subgroupMinSize: 32, subgroupMaxSize: 32 },
  };
  for (const [name, info] of Object.entries(seen)) {
    test(`takes what was seen where the engine ${name}`, () => {
      const { subgroups } = described(info, { subgroupSizes: [8, 16] });
      assertEquals(subgroups, { minSize: 8, maxSize: 16, directive: true });
    });
  }

  test("has no subgroups where the kernels found none", () => {
    assertEquals(described({ subgroupMinSize: 8, subgroupMaxSize: 8 }, { subgroupSizes: [] }).subgroups, null);
  });

  const ticks: [string, bigint[], Capabilities["timestamps"]][] = [
    ["no ticks", [], "none"],
    ["zeros", [0n, 0n, 0n, 0n], "none"],
    ["multiples of 65,536", [65536n * 7n, 65536n * 8n, 65536n * 8n], "quantised"],
    ["multiples of 100,000", [100000n * 7n, 100000n * 9n], "quantised"],
    ["one that is none", [65536n * 7n, 65536n * 8n + 32n], "exact"],
    ["multiples of one step and of the other", [65536n * 7n, 100000n * 9n], "exact"],
  ];
  for (const [name, given, expected] of ticks) {
    test(`calls timestamps ${expected} when they are ${name}`, () => {
      assertEquals(described({}, { ticks: given }).timestamps, expected);
    });
  }

  test("lists the subgroup matrices of a device that has the feature, and only then", () => {
    const config = { componentType: "f16", resultComponentType: "f32", M: 16, N: 8, K: 16 };
    const info = { subgroupMatrixConfigs: [config] };
    assertEquals(described(info).subgroupMatrices, []);
    const { subgroupMatrices } = described(info, {}, ["chromium-experimental-subgroup-matrix"]);
    assertEquals(subgroupMatrices, [config]);
  });

  test("tells OpenGL from the same adapter on Vulkan", () => {
    const device = { limits: defaultLimits, features: new Set(), adapterInfo: { description: "llvmpipe" } };
    const adapter = (graphicsApi: Engine["graphicsApi"]) =>
      capabilitiesOf(device as unknown as GPUDevice, { ...engine, graphicsApi }, findings).adapter;
    assertEquals([adapter(""), adapter("OpenGL")], ["llvmpipe", "llvmpipe over OpenGL"]);
  });
});

describe("deviceFingerprint()", () => {
  test("is one line", () => assertMatch(deviceFingerprint(capabilities), /^engine 1; card; [^\n]*$/));

  const changes: Record<string, Partial<Capabilities>> = {
    engine: { engine: "engine 2" },
    adapter: { adapter: "card over OpenGL" },
    f16: { f16: false },
    subgroups: { subgroups: null },
    "subgroup sizes": { subgroups: { minSize: 8, maxSize: 32, directive: true } },
    "subgroup matrices": {
      subgroupMatrices: [{ componentType: "f16", resultComponentType: "f32", M: 16, N: 16, K: 16 }],
    },
    limits: { limits: { ...defaultLimits, maxComputeWorkgroupStorageSize: 32768 } },
  };
  for (const [name, change] of Object.entries(changes)) {
    test(`differs when ${name} does`, () => {
      assertNotEquals(deviceFingerprint({ ...capabilities, ...change }), deviceFingerprint(capabilities));
    });
  }

  test("is the same for Dawn in another runtime, and another for another version", () => {
    const of = (name: string) => deviceFingerprint({ ...capabilities, engine: name });
    assertEquals(of("Dawn (webgpu 0.6.2, Bun 1.4.5)"), of("Dawn (webgpu 0.6.2, Node 20.20.2)"));
    assertNotEquals(of("Dawn (webgpu 0.6.2, Bun 1.4.5)"), of("Dawn (webgpu 0.7.0, Bun 1.4.5)"));
    assertNotEquals(of("wgpu (Deno 2.9.6)"), of("wgpu (Deno 2.9.7)"));
  });
});

describe("describeCapabilities()", () => {
  test("names everything that kernels care for", () => {
    const text = describeCapabilities({
      ...capabilities,
      software: true,
      subgroups: { minSize: 8, maxSize: 32, directive: true },
      subgroupMatrices: [{ componentType: "f16", resultComponentType: "f32", M: 16, N: 8, K: 16 }],
    });
    assertEquals(
      text,
      `engine             engine 1
adapter            card (in software)
half precision     yes
subgroups          of 8 to 32
subgroup matrices  16x8x16 f16 to f32
timestamps         exact
workgroups         256 invocations, 256 along x, 16 KiB of memory, 65535 per axis
buffers            256 MiB, bindings of 128 MiB, 8 to a kernel`,
    );
  });

  test("says what is missing", () => {
    const text = describeCapabilities({ ...capabilities, f16: false, subgroups: null, timestamps: "none" });
    assertMatch(text, /half precision +no\n/);
    assertMatch(text, /subgroups +no\n/);
    assertMatch(text, /timestamps +none\n/);
  });
});

describe("the probe", { skip }, () => {
  test("finds that the adapter computes", async () => {
    const { device } = await gpuContext();
    const found = await probe(device, await engineOf(device));
    assert(found.computes);
    assertEquals(found.f16, device.features.has("shader-f16"));
    assertEquals(found.ticks.length > 0, device.features.has("timestamp-query"));
  });

  test("agrees with the engine on subgroup sizes", async () => {
    const { device, capabilities: { subgroups } } = await gpuContext();
    const { subgroupSizes } = await probe(device, await engineOf(device));
    assertEquals(subgroups === null, subgroupSizes.length === 0);
    for (const size of subgroupSizes) assert(subgroups!.minSize <= size && size <= subgroups!.maxSize);
  });

  test("takes a directive that the compiler refuses for subgroups that are missing", async () => {
    const { device } = await gpuContext();
    const { subgroupsDirective, ...rest } = await engineOf(device);
    const found = await probe(device, { ...rest, subgroupsDirective: !subgroupsDirective });
    assertEquals(found.subgroupSizes, []);
    assert(found.computes);
  });

  test("finds neither half precision nor subgroups nor timestamps on a device without the features", async () => {
    const device = await (await (await findGpu()).requestAdapter())!.requestDevice();
    const { f16, subgroups, timestamps, limits } = await deviceCapabilities(device);
    assertEquals({ f16, subgroups, timestamps }, { f16: false, subgroups: null, timestamps: "none" });
    assertEquals(limits.maxComputeWorkgroupStorageSize, defaultLimits.maxComputeWorkgroupStorageSize);
    device.destroy();
  });

  test("has every feature that openDevice() gets from this adapter", async () => {
    const device = await openDevice();
    const { f16, subgroups, timestamps } = await deviceCapabilities(device);
    assertEquals(f16, device.features.has("shader-f16"));
    assertEquals(subgroups !== null, device.features.has("subgroups"));
    assertEquals(timestamps !== "none", device.features.has("timestamp-query"));
    device.destroy();
  });
});
