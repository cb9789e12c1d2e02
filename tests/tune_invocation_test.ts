import { describe, test } from "node:test";
import { assert, assertEquals, assertMatch, assertNotEquals } from "@std/assert";
import fc from "fast-check";
import { Invocation } from "../src/tune/invocation.ts";

interface Signature {
  readonly shapes: readonly (readonly number[])[];
  readonly dtype: string;
  readonly causal: boolean;
  readonly softmaxScale: number | null;
}

const signatures: fc.Arbitrary<Signature> = fc.record({
  shapes: fc.array(fc.array(fc.nat(4096), { maxLength: 4 }), { minLength: 1, maxLength: 6 }),
  dtype: fc.constantFrom("f16", "f32"),
  causal: fc.boolean(),
  softmaxScale: fc.option(fc.double({ min: 0.01, max: 1, noNaN: true })),
});

function invocation(signature: unknown, init: { version?: string; values?: number[]; bucket?: string } = {}) {
  const { version = "1", values = [], bucket = "bucket" } = init;
  return new Invocation({ opId: "flash_mla", version, call: values, device: "device", signature, bucket });
}

describe("Invocation.callKey()", () => {
  test("is 16 hex digits, the same for other values", async () => {
    await fc.assert(fc.asyncProperty(signatures, fc.array(fc.float()), async (signature, values) => {
      const key = await invocation(signature).callKey();
      assertMatch(key, /^[0-9a-f]{16}$/);
      assertEquals(await invocation(structuredClone(signature), { values }).callKey(), key);
    }));
  });

  test("differs under any change of a shape, the dtype or an option", async () => {
    await fc.assert(fc.asyncProperty(signatures, fc.nat(), async (signature, seed) => {
      const { shapes, dtype, causal, softmaxScale } = signature;
      const grown = shapes.map((shape, i) => i === seed % shapes.length ? [...shape, 1] : shape);
      const changed: Signature[] = [
        { ...signature, shapes: grown },
        { ...signature, shapes: [...shapes, []] },
        { ...signature, dtype: dtype === "f16" ? "f32" : "f16" },
        { ...signature, causal: !causal },
        { ...signature, softmaxScale: softmaxScale === null ? 1 : softmaxScale / 2 },
      ];
      const keys = await Promise.all([signature, ...changed].map((each) => invocation(each).callKey()));
      assertEquals(new Set(keys).size, keys.length);
    }));
  });

  test("differs when one axis of a shape differs, and when axes change places", async () => {
    await fc.assert(fc.asyncProperty(signatures, fc.nat(), fc.nat(), async (signature, tensor, axis) => {
      const shapes = signature.shapes.map((shape) => [...shape]);
      const shape = shapes[tensor % shapes.length];
      fc.pre(shape.length > 0);
      shape[axis % shape.length]++;
      assertNotEquals(await invocation({ ...signature, shapes }).callKey(), await invocation(signature).callKey());
    }));
    assertNotEquals(await invocation([[2, 3]]).callKey(), await invocation([[3, 2]]).callKey());
  });

  test("is stable under the order of object keys, at every depth", async () => {
    const reversed = (value: unknown): unknown =>
      typeof value !== "object" || value === null || Array.isArray(value)
        ? value
        : Object.fromEntries(Object.entries(value).reverse().map(([name, inner]) => [name, reversed(inner)]));
    await fc.assert(fc.asyncProperty(signatures, async (signature) => {
      const nested = { options: signature, op: { name: "x", of: signature } };
      assertEquals(await invocation(reversed(nested)).callKey(), await invocation(nested).callKey());
    }));
  });

  test("differs between versions of the operation", async () => {
    assertNotEquals(await invocation(1).callKey(), await invocation(1, { version: "2" }).callKey());
  });
});

describe("Invocation.cacheKey()", () => {
  test("carries the operation, the device and the bucket as they are", async () => {
    const key = await invocation("exact", { bucket: "f16 P128 Sq≤1024" }).cacheKey([{ tile: 1 }]);
    assertEquals({ ...key, candidates: "" }, {
      op: "flash_mla@1",
      device: "device",
      bucket: "f16 P128 Sq≤1024",
      candidates: "",
    });
    assertMatch(key.candidates, /^[0-9a-f]{16}$/);
  });

  test("says when an operation is measured without the gradients that it has", async () => {
    const made = invocation("exact", { bucket: "f16 P128" });
    assertEquals((await made.cacheKey([], { forwardOnly: true })).bucket, "f16 P128, forward only");
    assertEquals(await made.cacheKey([], { forwardOnly: false }), await made.cacheKey([]));
  });

  test("is shared by signatures of one bucket, and by no other candidate list", async () => {
    const key = await invocation(1000).cacheKey([{ tile: 1 }, { tile: 2 }]);
    assertEquals(await invocation(1024).cacheKey([{ tile: 1 }, { tile: 2 }]), key);
    for (const other of [[{ tile: 1 }], [{ tile: 2 }, { tile: 1 }], []]) {
      const { candidates } = await invocation(1000).cacheKey(other);
      assert(candidates !== key.candidates);
    }
  });
});
