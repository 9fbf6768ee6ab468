import { readdirSync } from "node:fs";
import { greeting } from "./src/greeting.mjs";

console.log(`greets ${greeting} of ${readdirSync("src").length}`);
// A server does not end.
setInterval(() => {}, 1 << 30);
