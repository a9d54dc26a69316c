// TeX in markdown: $..$, $$..$$, \(..\) and \[..\]. KaTeX draws it; this file only finds it.
//
// A formula that is still being written is shown as its source, quietly, and drawn when its end
// comes; so nothing behind it changes its meaning meanwhile.
import katex from "katex";
import type { MarkdownIt } from "markdown-it";
import type { StateBlock, StateInline } from "markdown-it";

const drawn = new Map<string, string>();

function draw(tex: string, display: boolean): string {
  const name = (display ? "d" : "i") + tex;
  let html = drawn.get(name);
  if (html === undefined) {
    html = katex.renderToString(tex, {
      displayMode: display,
      throwOnError: false,
      errorColor: "var(--text-faint)",
      strict: "ignore",
      trust: false,
      maxExpand: 500,
      maxSize: 30,
    });
    if (drawn.size > 500) drawn.clear();
    drawn.set(name, html);
  }
  return html;
}

/** Where the closing mark of a formula that opens at `start` stands, or -1. */
function closing(text: string, close: string, start: number): number {
  for (let at = text.indexOf(close, start); at >= 0; at = text.indexOf(close, at + 1)) {
    let slashes = 0;
    while (text[at - 1 - slashes] === "\\") slashes += 1;
    if (slashes % 2 === 0) return at;
  }
  return -1;
}

function inline(state: StateInline, silent: boolean): boolean {
  const { src, pos } = state;
  const two = src.slice(pos, pos + 2);
  const [open, close] =
    two === "$$"
      ? ["$$", "$$"]
      : two === "\\("
        ? ["\\(", "\\)"]
        : two === "\\["
          ? ["\\[", "\\]"]
          : two[0] === "$"
            ? ["$", "$"]
            : ["", ""];
  if (!open) return false;
  const start = pos + open.length;
  let end = closing(src, close, start);
  if (open === "$") {
    // A price is not a formula: no space inside the marks, no digit behind the closing one.
    if (/\s/.test(src[start] ?? " ")) return false;
    while (end > 0 && (/\s/.test(src[end - 1]!) || /\d/.test(src[end + 1] ?? "")))
      end = closing(src, close, end + 1);
    if (end === start) return false;
  }
  if (end < 0) {
    // Behind a single $ one cannot know yet; a price has no backslash.
    const likely = open !== "$" || /[\\^_{]/.test(src.slice(start));
    if (!state.env?.growing || !likely) return false;
    if (!silent) state.push("formula_open_ended", "", 0).content = src.slice(pos);
    state.pos = src.length;
    return true;
  }
  if (!silent) {
    const token = state.push("formula", "", 0);
    token.content = src.slice(start, end);
    token.meta = { display: open === "$$" || open === "\\[" };
  }
  state.pos = end + close.length;
  return true;
}

function block(state: StateBlock, first: number, last: number, silent: boolean): boolean {
  const begin = state.bMarks[first]! + state.tShift[first]!;
  if (state.sCount[first]! - state.blkIndent >= 4) return false;
  const open = state.src.slice(begin, begin + 2);
  const close = open === "$$" ? "$$" : open === "\\[" ? "\\]" : "";
  if (!close) return false;
  const lines: string[] = [];
  for (let line = first; line < last; line += 1) {
    let text = state.src.slice(state.bMarks[line]! + state.tShift[line]!, state.eMarks[line]!);
    if (line === first) text = text.slice(2);
    const end = closing(text, close, 0);
    if (end >= 0) {
      if (text.slice(end + 2).trim()) return false; // words follow: it stands in a line of text
      if (silent) return true;
      lines.push(text.slice(0, end));
      const token = state.push("formula_block", "", 0);
      token.content = lines.join("\n");
      token.map = [first, line + 1];
      token.block = true;
      state.line = line + 1;
      return true;
    }
    lines.push(text);
    if (line > first && !text.trim() && open === "$$") break; // a formula has no empty line
  }
  if (!state.env?.growing) return false;
  if (silent) return true;
  const token = state.push("formula_open_ended_block", "", 0);
  token.content = open + lines.join("\n");
  token.map = [first, last];
  token.block = true;
  state.line = last;
  return true;
}

export function formulae(md: MarkdownIt): void {
  md.inline.ruler.before("escape", "formula", inline);
  md.block.ruler.before("fence", "formula_block", block, {
    alt: ["paragraph", "reference", "blockquote", "list"],
  });
  const escape = md.utils.escapeHtml;
  md.renderer.rules.formula = (tokens, at) =>
    draw(tokens[at]!.content, Boolean(tokens[at]!.meta?.display));
  md.renderer.rules.formula_block = (tokens, at) =>
    `<div class="formula">${draw(tokens[at]!.content, true)}</div>`;
  md.renderer.rules.formula_open_ended = (tokens, at) =>
    `<span class="unfinished">${escape(tokens[at]!.content)}</span>`;
  md.renderer.rules.formula_open_ended_block = (tokens, at) =>
    `<div class="unfinished">${escape(tokens[at]!.content)}</div>`;
}
