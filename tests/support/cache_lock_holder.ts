// Keeps a SQLite file in the middle of a write, as a process that was stopped there would, until it is told to go on.

import process from "node:process";
import { DatabaseSync } from "node:sqlite";

const database = new DatabaseSync(process.argv[2]!);
database.exec("BEGIN IMMEDIATE");
console.log("held");
await new Promise((resolve) => process.stdin.once("data", resolve));
process.stdin.destroy();
database.exec("COMMIT");
database.close();
