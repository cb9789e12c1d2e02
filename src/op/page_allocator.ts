// Which pages of a cache are held, and by how many sequences. Accounting only: no memory is touched here.

import { FlashMLAError } from "./errors.ts";
import { kindOf } from "./tensor.ts";

/** Pages handed out and counted: each is free, or held by one holder or several. */
export class PageAllocator {
  /** Pages that there are. */
  readonly pages: number;
  readonly #holders: Int32Array;
  /** Free pages, the next one to hand out last. */
  readonly #free: number[];

  /** @param pages How many pages there are. */
  constructor(pages: number) {
    this.pages = pages;
    this.#holders = new Int32Array(pages);
    this.#free = Array.from({ length: pages }, (_, i) => pages - 1 - i);
  }

  /** Pages that nobody holds. */
  get freePages(): number {
    return this.#free.length;
  }

  /** Pages that somebody holds. */
  get heldPages(): number {
    return this.pages - this.#free.length;
  }

  /** How many hold a page; 0 for a free one. */
  holders(page: number): number {
    return this.#holders[page] ?? 0;
  }

  /**
   * Takes free pages.
   *
   * @param count How many.
   * @returns Their numbers, each held once.
   * @throws {FlashMLAError} With code `limit` when fewer are free; nothing is taken then.
   */
  allocate(count: number): Int32Array {
    if (!Number.isSafeInteger(count) || count < 0) {
      throw new FlashMLAError(
        "invalid-input",
        `Cannot allocate pages: count must be a whole number, got ${kindOf(count)}`,
      );
    }
    if (count > this.#free.length) {
      throw new FlashMLAError(
        "limit",
        `Cannot allocate ${count} pages: ${this.#free.length} of ${this.pages} are free; free pages of sequences that ` +
          "have ended, or create a cache with more",
      );
    }
    const taken = Int32Array.from({ length: count }, () => this.#free.pop()!);
    for (const page of taken) this.#holders[page] = 1;
    return taken;
  }

  /**
   * Lets go of pages; those that nobody holds any more become free.
   *
   * @param pages Their numbers; one that is named twice is let go of twice.
   * @throws {FlashMLAError} With code `invalid-input` when one is not held as often; nothing is let go of then.
   */
  free(pages: ArrayLike<number>): void {
    for (const [page, times] of this.#counted("free", pages)) {
      if (this.#holders[page] < times) {
        const held = this.#holders[page];
        this.#refuse(
          "free",
          `page ${page} is held ${held === 0 ? "by nobody" : `${held} times`}, it is named ${times} times`,
        );
      }
    }
    for (let i = 0; i < pages.length; i++) {
      if (--this.#holders[pages[i]] === 0) this.#free.push(pages[i]);
    }
  }

  /**
   * Holds pages once more, for a sequence that shares them.
   *
   * @param pages Their numbers.
   * @throws {FlashMLAError} With code `invalid-input` when one is free; nothing is held then.
   */
  share(pages: ArrayLike<number>): void {
    for (const [page] of this.#counted("fork", pages)) {
      if (this.#holders[page] === 0) this.#refuse("fork", `page ${page} was freed or never allocated`);
    }
    for (let i = 0; i < pages.length; i++) this.#holders[pages[i]]++;
  }

  /** Frees all pages. */
  clear(): void {
    this.#holders.fill(0);
    this.#free.splice(0, this.#free.length, ...Array.from({ length: this.pages }, (_, i) => this.pages - 1 - i));
  }

  #counted(what: string, pages: ArrayLike<number>): Map<number, number> {
    if (typeof pages !== "object" || pages === null || !Number.isSafeInteger(pages.length)) {
      this.#refuse(what, `expected an Int32Array or an array of page numbers, got ${kindOf(pages)}`);
    }
    const counts = new Map<number, number>();
    for (let i = 0; i < pages.length; i++) {
      const page = pages[i];
      if (!Number.isSafeInteger(page) || page < 0 || page >= this.pages) {
        this.#refuse(
          what,
          `page ${kindOf(page)} at index ${i} is outside the cache, which has pages 0 to ${this.pages - 1}`,
        );
      }
      counts.set(page, (counts.get(page) ?? 0) + 1);
    }
    return counts;
  }

  #refuse(what: string, why: string): never {
    throw new FlashMLAError("invalid-input", `Cannot ${what} pages: ${why}`);
  }
}
