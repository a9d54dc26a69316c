// A model's text to safe HTML, in blocks. This is the only place where text becomes HTML.
//
// markdown-it escapes raw HTML, and DOMPurify looks at what came out once more. Pictures are not
// fetched (their address would tell whoever named it that one reads), only linked.
import DOMPurify from "dompurify";
import MarkdownIt from "markdown-it";
import { formulae } from "./formulae";
import { coloured } from "./highlight";
import { chatWords as t } from "./words";

const md = new MarkdownIt({ html: false, linkify: true, breaks: false, typographer: false });
md.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false });
md.disable("lheading"); // "Steps:\n-" would be a heading until the list's first word comes
md.use(formulae);

const escape = md.utils.escapeHtml;

function codeBox(code: string, language: string): string {
  const inside = coloured(code, language) ?? escape(code);
  const name = escape(language || t("code"));
  return (
    `<div class="code"><div class="code-head"><span>${name}</span>` +
    `<button type="button" class="copy-code">${escape(t("copy"))}</button></div>` +
    `<pre tabindex="0"><code>${inside}</code></pre></div>`
  );
}

md.renderer.rules.fence = (tokens, at) => {
  const token = tokens[at]!;
  return codeBox(token.content, token.info.trim().split(/\s+/)[0]!.toLowerCase());
};
md.renderer.rules.code_block = (tokens, at) => codeBox(tokens[at]!.content, "");
md.renderer.rules.image = (tokens, at) => {
  const source = String(tokens[at]!.attrGet("src") ?? "");
  const words = tokens[at]!.content || source;
  return `<a class="picture" href="${escape(source)}">${escape(t("picture", { name: words }))}</a>`;
};
md.renderer.rules.table_open = () => `<div class="table-box" tabindex="0"><table>`;
md.renderer.rules.table_close = () => `</table></div>`;

const purify = DOMPurify(window);
purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});
const SAFE = {
  ADD_TAGS: ["semantics", "annotation"], // KaTeX's MathML, for screen readers
  FORBID_TAGS: ["img", "picture", "video", "audio", "source", "iframe", "form", "input", "style"],
  ALLOW_DATA_ATTR: false,
  SANITIZE_NAMED_PROPS: true,
  RETURN_DOM_FRAGMENT: true as const,
};

/** Nodes to put into the page. */
export function safe(html: string): DocumentFragment {
  return purify.sanitize(html, SAFE);
}

export interface Block {
  html: string;
  /** Where it ends in the text; what stands before is finished once another block follows. */
  end: number;
}

/** The top-level blocks of a text (paragraph, list, fence...). `growing`: more of it is to come. */
export function blocks(text: string, growing: boolean): Block[] {
  const source = growing ? mended(text) : text;
  const env = { growing };
  const tokens = md.parse(source, env);
  const starts = [0];
  for (let at = source.indexOf("\n"); at >= 0; at = source.indexOf("\n", at + 1)) starts.push(at + 1);
  const made: Block[] = [];
  for (let at = 0; at < tokens.length; ) {
    let to = at + 1;
    for (let depth = tokens[at]!.nesting; depth > 0; to += 1) depth += tokens[to]!.nesting;
    const html = md.renderer.render(tokens.slice(at, to), md.options, env);
    const line = tokens[at]!.map?.[1] ?? starts.length;
    made.push({ html, end: Math.min(starts[line] ?? text.length, text.length) });
    at = to;
  }
  return made;
}

/** Closes, for the eye, what the last line has opened and not closed yet: emphasis, code, a link. */
export function mended(text: string): string {
  const fences = text.match(/^\s{0,3}(```|~~~)/gm)?.length ?? 0;
  if (fences % 2) return text;
  const from = text.lastIndexOf("\n\n") + 1;
  let last = text.slice(from);
  if ((last.match(/(?<!`)`(?!`)/g)?.length ?? 0) % 2) return text + "`";
  const plain = last.replace(/`[^`]*`/g, "").replace(/\$[^$]*\$/g, "");
  last = last.replace(/!?\[([^\][]*)\]\([^)\s]*$/, "$1").replace(/(^|\s)!?\[([^\][\\]*)$/, "$1$2");
  last = last.replace(/(?:\*{1,3}|~~?)$/, ""); // a mark with nothing behind it yet
  for (const mark of ["**", "~~"]) {
    const opened = plain.split(mark).length - 1;
    if (opened % 2 && !plain.endsWith(mark)) last = last.trimEnd() + mark;
  }
  return text.slice(0, from) + last;
}
