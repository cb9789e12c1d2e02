import { describe, test } from "node:test";
import { assertEquals } from "@std/assert";
import { wantedCache } from "../src/cache/cache_location.ts";

describe("wantedCache()", () => {
  test("knows memory and off however they are written", () => {
    for (const text of ["off", "OFF", " Off ", "oFf\n"]) assertEquals(wantedCache(text), "off");
    for (const text of ["memory", "Memory", "\tMEMORY"]) assertEquals(wantedCache(text), "memory");
  });

  test("takes everything else for a path, as it stands", () => {
    for (const text of ["/tmp/off", "./memory", "offline", " spaced.kv"]) assertEquals(wantedCache(text), text);
  });
});
