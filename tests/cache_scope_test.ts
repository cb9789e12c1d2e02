import { describe, test } from "node:test";
import { assertEquals, assertRejects, assertThrows } from "@std/assert";
import fc from "fast-check";
import { Scope } from "../src/cache/scope.ts";
import { closedGate } from "./support/cache_gate.ts";

const innermost = <T>(scope: Scope<T>): T | undefined => scope.find((value) => value);
const visible = <T>(scope: Scope<T>): T[] => {
  const seen: T[] = [];
  scope.find((value) => void seen.push(value));
  return seen;
};

for (const kind of ["asynchronous", "stack"] as const) {
  const make = <T>(): Scope<T> => new Scope<T>(kind === "asynchronous");

  describe(`Scope (${kind})`, () => {
    test("find() asks the innermost first and falls through to outer ones", () => {
      const scope = make<Record<string, number>>();
      using _outer = scope.enter({ a: 1, b: 2 });
      using _inner = scope.enter({ a: 3 });
      assertEquals(scope.find((value) => value.a), 3);
      assertEquals(scope.find((value) => value.b), 2);
      assertEquals(scope.find((value) => value.c), undefined);
    });

    test("enter() and disposal in any order agree with a list", () => {
      fc.assert(fc.property(fc.array(fc.option(fc.nat(7)), { maxLength: 40 }), (steps) => {
        const scope = make<number>();
        let open: [number, Disposable][] = [];
        steps.forEach((step, i) => {
          if (step === null || open.length === 0) return open.push([i, scope.enter(i)]);
          const [ended] = open.splice(step % open.length, 1);
          ended![1][Symbol.dispose]();
          ended![1][Symbol.dispose]();
        });
        assertEquals(visible(scope), open.map(([value]) => value).reverse());
        for (const [, handle] of open) handle[Symbol.dispose]();
        open = [];
        assertEquals(visible(scope), []);
      }));
    });

    test("run() ends with the function, whether it returns or throws", () => {
      const scope = make<number>();
      assertEquals(scope.run(1, () => innermost(scope)), 1);
      assertThrows(
        () =>
          scope.run(1, () => {
            throw new Error("from inside");
          }),
        Error,
        "from inside",
      );
      assertEquals(innermost(scope), undefined);
    });

    test("run() lasts until the promise has settled, and no longer", async () => {
      const scope = make<number>();
      const stray = closedGate();
      let strayRead: Promise<number | undefined> | undefined;
      const result = await scope.run(1, async () => {
        strayRead = stray.promise.then(() => innermost(scope));
        await Promise.resolve();
        return innermost(scope);
      });
      assertEquals(result, 1);
      assertEquals(innermost(scope), undefined);
      stray.resolve();
      assertEquals(await strayRead, undefined);
      await assertRejects(() => scope.run(2, () => Promise.reject(new Error("from inside"))), Error, "from inside");
      assertEquals(innermost(scope), undefined);
    });

    test("enter() is over for everyone once disposed, when it leaked into the caller", async () => {
      const scope = make<number>();
      const gate = closedGate();
      const inner = async (): Promise<number | undefined> => {
        using _ = scope.enter(1);
        await gate.promise;
        return innermost(scope);
      };
      const running = inner();
      const beside = gate.promise.then(() => undefined).then(() => running).then(() => innermost(scope));
      gate.resolve();
      assertEquals(await running, 1);
      assertEquals(await beside, undefined);
      assertEquals(innermost(scope), undefined);
    });

    test("sees only the last of a thousand blocks that each overlap the next", () => {
      const scope = make<number>();
      let last = scope.enter(0);
      for (let i = 1; i < 1000; i++) {
        const next = scope.enter(i);
        last[Symbol.dispose]();
        last = next;
        assertEquals(visible(scope), [i]);
      }
      last[Symbol.dispose]();
      assertEquals(visible(scope), []);
    });

    test("two blocks that overlap and end in the order they began see no ended one", async () => {
      const scope = make<number>();
      const gates = [closedGate(), closedGate()] as const;
      const block = async (value: number): Promise<number[]> => {
        using _ = scope.enter(value);
        await gates[value]!.promise;
        return visible(scope);
      };
      const [first, second] = [block(0), block(1)];
      gates[0].resolve();
      assertEquals((await first).includes(0), true);
      gates[1].resolve();
      assertEquals(await second, [1]);
    });
  });
}

describe("Scope (asynchronous)", () => {
  test("run() keeps overlapping calls apart, in whichever order they go on", async () => {
    const scope = new Scope<number>();
    await fc.assert(fc.asyncProperty(fc.shuffledSubarray([0, 1, 2, 3, 4], { minLength: 5 }), async (order) => {
      const gates = order.map(() => closedGate());
      const calls = gates.map((gate, value) =>
        scope.run(value, async () => {
          await gate.promise;
          const before = visible(scope);
          await Promise.resolve();
          return [before, visible(scope)];
        })
      );
      assertEquals(visible(scope), []);
      for (const next of order) gates[next]!.resolve();
      assertEquals(await Promise.all(calls), gates.map((_, value) => [[value], [value]]));
    }));
  });

  test("enter() after an await stays inside the function", async () => {
    const scope = new Scope<number>();
    const gate = closedGate();
    const inner = async (): Promise<number | undefined> => {
      await Promise.resolve();
      using _ = scope.enter(1);
      await gate.promise;
      return innermost(scope);
    };
    const running = inner();
    await Promise.resolve();
    await Promise.resolve();
    assertEquals(innermost(scope), undefined);
    gate.resolve();
    assertEquals(await running, 1);
  });
});
