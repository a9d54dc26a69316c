// Builds the page into the Python package. The names of files carry a hash of what is in them, so
// a browser may keep them for ever; index.html is the only name that stays.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { defineConfig } from "vite";

const OUT = "../src/qiusuo/server/static";
const SOURCES = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.js"];

/** Every current browser reads woff2; KaTeX's other two formats would be 800 KB for nobody. */
const onlyWoff2 = {
  name: "only-woff2",
  enforce: "pre",
  transform(code, id) {
    if (!/katex[^/]*\.css$/.test(id)) return null;
    return code.replace(/,\s*url\([^)]*\.(?:woff|ttf)\)\s*format\("(?:woff|truetype)"\)/g, "");
  },
};

/** sources.sha256 tells, without node, whether the built files belong to these sources:
 * the SHA-256 of each file's path, a zero byte, its bytes, a zero byte; in the order of paths. */
let out = OUT;
const markSources = {
  name: "mark-sources",
  configResolved(config) {
    out = config.build.outDir;
  },
  closeBundle() {
    const inSrc = readdirSync("src", { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name).replaceAll("\\", "/"));
    const mark = createHash("sha256");
    for (const path of [...SOURCES, ...inSrc].sort()) {
      mark.update(path).update("\0").update(readFileSync(path)).update("\0");
    }
    writeFileSync(join(out, "sources.sha256"), mark.digest("hex") + "\n");
  },
};

export default defineConfig({
  plugins: [onlyWoff2, markSources],
  build: {
    outDir: OUT,
    emptyOutDir: true,
    manifest: "manifest.json",
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0, // the page's policy allows no data: fonts
    target: "es2022",
    chunkSizeWarningLimit: 700,
  },
  server: {
    proxy: Object.fromEntries(
      ["/api", "/v1"].map((path) => [path, process.env.QIUSUO ?? "http://127.0.0.1:8000"]),
    ),
  },
});
