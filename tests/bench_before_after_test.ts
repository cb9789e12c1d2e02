import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { changes, changesText } from "../bench/before_after.ts";

const row = (path: string, ms: number) => ({ shape: "some", path, step: "attend" as const, ms });
const failed = (path: string) => ({ shape: "some", path, step: "attend" as const, error: "no memory" });

describe("changes()", () => {
  test("calls a row slower or faster only past the tolerance", () => {
    const before = [row("a", 10), row("b", 10), row("c", 10), row("d", 10)];
    const after = [row("a", 10.2), row("b", 10.4), row("c", 5), row("d", 9.8)];
    assertEquals(
      changes(before, after).map(({ path, ratio, verdict }) => [path, ratio, verdict]),
      [["a", 10 / 10.2, "same"], ["b", 10 / 10.4, "slower"], ["c", 2, "faster"], ["d", 10 / 9.8, "same"]],
    );
  });

  test("tells new rows, failed ones, and those that are gone", () => {
    const before = [failed("a"), row("b", 1), row("gone", 1), failed("never")];
    const after = [row("a", 1), failed("b"), row("c", 1)];
    assertEquals(
      changes(before, after).map(({ path, beforeMs, afterMs, ratio, verdict }) =>
        [path, beforeMs, afterMs, ratio, verdict] as const
      ),
      [
        ["a", null, 1, null, "new"],
        ["b", 1, null, null, "failed"],
        ["c", null, 1, null, "new"],
        ["gone", 1, null, null, "missing"],
      ],
    );
  });

  test("keeps rows of one path apart by shape and step", () => {
    const other = { ...row("a", 4), step: "expand" as const };
    const elsewhere = { ...row("a", 8), shape: "other" };
    assertEquals(
      changes([row("a", 2), other, elsewhere], [row("a", 1), other, elsewhere]).map(({ ratio }) => ratio),
      [2, 1, 1],
    );
  });
});

describe("changesText()", () => {
  test("marks what got slower and counts it", () => {
    const text = changesText(changes([row("a", 1), row("b", 1)], [row("a", 2), row("b", 1)])).split("\n");
    assert(text[1].endsWith("SLOWER") && text[2].endsWith("same"), text.join("\n"));
    assertEquals(text.at(-1), "1 of 2 rows slower by more than 3 %");
  });
});
