// The example page in headless Chromium, on SwiftShader: as a user sees it, and as the result object says it.
// Screenshots go to .browser/, for people to look at.

import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertEquals, assertMatch } from "@std/assert";
import type { Page } from "playwright-core";
import { skip, softwareWebGpu, visiting } from "./support/browser.ts";

/** What the page leaves behind; see examples/browser/main.ts. */
interface Result {
  readonly ok: boolean;
  readonly platform: string;
  readonly adapter: string;
  readonly tolerance: number;
  readonly rows: readonly {
    readonly tokens: number;
    readonly config: { readonly blockQ: number; readonly blockK: number } | null;
    readonly source: string | null;
    readonly ms: number;
    readonly oracleMs: number | null;
    readonly relL2: number | null;
  }[];
  readonly error: { readonly code: string; readonly message: string } | null;
}

/** Waits until a run is over. On SwiftShader a length takes about 10 s, most of it for compiling. */
async function result(page: Page): Promise<Result> {
  await page.waitForFunction("globalThis.__flashMlaResult !== undefined", undefined, { timeout: 150_000 });
  return await page.evaluate("globalThis.__flashMlaResult");
}

async function screenshots(page: Page, name: string): Promise<void> {
  const sizes = { desktop: [1280, 800, "light"], dark: [1280, 800, "dark"], phone: [390, 844, "light"] } as const;
  for (const [size, [width, height, colorScheme]] of Object.entries(sizes)) {
    await page.setViewportSize({ width, height });
    await page.emulateMedia({ colorScheme });
    await page.waitForTimeout(100); // the chart is drawn again, at its new width
    const path = fileURLToPath(new URL(`../.browser/${name}-${size}.png`, import.meta.url));
    await page.screenshot({ path, fullPage: true });
  }
}

test("the page measures on a software adapter, agrees with the oracle, and shows it", { skip }, async () => {
  await visiting(softwareWebGpu, async ({ page, url, complaints }) => {
    await page.goto(url);
    const found = await result(page);
    await screenshots(page, "results");

    assertEquals(found.error, null);
    assertEquals([found.ok, found.platform], [true, "webgpu"]);
    assert(/swiftshader/i.test(found.adapter), found.adapter);
    const lengths = [16, 32, 64, 128, 256];
    assertEquals(found.rows.map(({ tokens }) => tokens), lengths);
    for (const { tokens, source, ms, oracleMs, relL2 } of found.rows) {
      assert(ms > 0 && oracleMs !== null && oracleMs > 0, `${tokens} tokens: ${ms} ms, oracle ${oracleMs} ms`);
      assert(relL2 !== null && relL2 > 0 && relL2 <= 1e-5, `${tokens} tokens: relL2 ${relL2}`);
      // Below 64 tokens only one tile is worth its compile time.
      assertEquals(source, tokens < 64 ? "heuristic" : "autotune", `${tokens} tokens`);
    }

    const cells = await page.locator("#table tbody tr").evaluateAll((lines) =>
      lines.map((line) => [...line.children].map(({ textContent }) => textContent ?? ""))
    );
    assertEquals(cells.map(([tokens]) => tokens), lengths.map(String));
    found.rows.forEach(({ config }, i) => {
      assert(
        cells[i].some((text) => text.includes(`${config!.blockQ} queries × ${config!.blockK} keys`)),
        cells[i].join(),
      );
    });
    for (const kind of ["call", "oracle"]) {
      assertEquals(await page.locator(`#chart > svg > g.${kind} .point`).count(), lengths.length, `points of ${kind}`);
    }
    const described = await page.locator("#chart svg").getAttribute("aria-labelledby");
    for (const id of described!.split(" ")) assert((await page.locator(`#${id}`).textContent())!.length > 0, id);
    assert((await page.locator("#facts").textContent())!.includes("software"));
    assert((await page.locator("#summary").textContent())!.includes("All 5 results agree with the oracle"));
    assertEquals(complaints, []);
  });
});

test("a later visit finds the configurations of an earlier one", { skip }, async () => {
  await visiting(softwareWebGpu, async ({ page, url, complaints }) => {
    const sources: (string | null)[] = [];
    for (let i = 0; i < 2; i++) {
      await page.goto(`${url}?longest=64`);
      sources.push((await result(page)).rows[2].source);
    }
    assertEquals(sources, ["autotune", "persistent"]);
    assert((await page.locator("#table").textContent())!.includes("measured on an earlier visit"));
    assertEquals(complaints, []);
  });
});

test("without WebGPU the page runs the reference, and says why", { skip }, async () => {
  const ways = [
    { flags: ["--host-resolver-rules=MAP page.test 127.0.0.1"], host: "page.test", why: "https or localhost only" },
    { flags: ["--disable-features=WebGPUService"], host: "localhost", why: "found no adapter" },
    { flags: [], host: "localhost", script: "delete Navigator.prototype.gpu", why: "has no WebGPU" },
  ];
  for (const { flags, host, script, why } of ways) {
    await visiting(flags, async ({ page, url, complaints }) => {
      if (script !== undefined) await page.addInitScript(script);
      await page.goto(`${url.replace("localhost", host)}?longest=64`);
      const found = await result(page);
      if (host !== "localhost") await screenshots(page, "without-webgpu");
      assertEquals(found.error, null, why);
      assertEquals([found.ok, found.platform, found.adapter], [true, "reference", "none"]);
      assertEquals(found.rows.map(({ tokens, relL2 }) => [tokens, relL2]), [[16, null], [32, null], [64, null]]);
      const notice = page.locator("#notice");
      assert(await notice.isVisible());
      assertMatch((await notice.textContent())!, new RegExp(`${why}.*The reference runs instead`));
      assertEquals(await page.locator("#chart > svg > g.call .point").count(), 3);
      // Chromium's own words for there being no adapter.
      assertEquals(complaints.filter((line) => !line.includes("Failed to create WebGPU Context Provider")), []);
    });
  }
});

test("Stop ends a run before its next step", { skip }, async () => {
  await visiting([], async ({ page, url }) => {
    await page.goto(`${url}?longest=2048`);
    await page.getByRole("button", { name: "Stop" }).press("Enter");
    const stopped = await result(page);
    assertEquals([stopped.ok, stopped.error?.code], [false, "stopped"]);
    assertEquals(await page.locator("#status").textContent(), "Stopped.");
    assert(await page.getByRole("button", { name: "Run again" }).isEnabled());
  });
});

test("a lost device gives a readable error, and the next run a new device", { skip }, async () => {
  await visiting(softwareWebGpu, async ({ page, url, complaints }) => {
    await page.addInitScript(`
      const requestDevice = GPUAdapter.prototype.requestDevice;
      GPUAdapter.prototype.requestDevice = async function (descriptor) {
        return globalThis.opened = await requestDevice.call(this, descriptor);
      };
    `);
    await page.goto(`${url}?longest=16`);
    await page.waitForFunction("globalThis.opened !== undefined");
    await page.locator("#status").getByText("first call").waitFor();
    await page.evaluate("globalThis.opened.destroy()");
    const lost = await result(page);
    await screenshots(page, "lost-device");
    assertEquals([lost.ok, lost.error?.code], [false, "device"]);
    const failure = page.locator("#failure");
    assert(await failure.isVisible());
    assertMatch((await failure.textContent())!, /The GPU failed\. “Run again” opens it anew\..*swiftshader.*was lost/);

    await page.getByRole("button", { name: "Run again" }).press("Enter");
    await page.waitForFunction("globalThis.__flashMlaResult === undefined");
    const again = await result(page);
    assertEquals([again.ok, again.rows.length], [true, 1]);
    assert(!await failure.isVisible());
    assertEquals(complaints, []);
  });
});
