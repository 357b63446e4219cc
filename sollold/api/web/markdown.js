// Renders Markdown as elements: no HTML is ever parsed, and links go to http, https and mailto only.

import { copyButton, el, scrolling } from "./dom.js";

/** Return a function that draws text into `place`; called again, it redraws only the blocks that changed. */
export function markdown(place) {
  let before = [];
  return (text) => {
    const blocks = split(text);
    blocks.forEach((block, at) => {
      if (before[at] === block) return;
      const node = render(block);
      const old = place.children[at];
      if (old) old.replaceWith(node); else place.append(node);
    });
    while (place.children.length > blocks.length) place.lastChild.remove();
    before = blocks;
  };
}

function split(text) {
  const blocks = [];
  let block = [];
  let fence = "";
  const end = () => { if (block.length) blocks.push(block.join("\n")); block = []; };
  for (const line of text.split("\n")) {
    const mark = line.match(/^ {0,3}(`{3,}|~{3,})/);
    if (fence) {
      block.push(line);
      if (mark && mark[1][0] === fence[0] && mark[1].length >= fence.length && !line.trim().slice(mark[1].length)) { fence = ""; end(); }
    } else if (mark) {
      end();
      fence = mark[1];
      block.push(line);
    } else if (!line.trim()) {
      // An empty line ends every block, also a list.
      end();
    } else if (/^ {0,3}#{1,6}\s/.test(line)) {
      end();
      block.push(line);
      end();
    } else {
      if (block.length && isItem(line) && !isItem(block[0])) end();
      block.push(line);
    }
  }
  end();
  return blocks;
}

const isItem = (line) => /^\s*([-*+]|\d{1,9}[.)])\s+/.test(line);

function render(block) {
  const rows = block.split("\n");
  const fence = rows[0].match(/^ {0,3}(?:`{3,}|~{3,})\s*([\w+#.-]*)/);
  if (fence) return code(rows, fence[1]);
  const heading = rows[0].match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*$/);
  if (heading) return fill(el(`h${Math.min(6, heading[1].length + 2)}`), heading[2]);
  if (/^ {0,3}([-*_])(?:\s*\1){2,}\s*$/.test(rows[0]) && rows.length === 1) return el("hr");
  if (rows.every((row) => /^ {0,3}>/.test(row))) {
    const quote = el("blockquote");
    markdown(quote)(rows.map((row) => row.replace(/^ {0,3}> ?/, "")).join("\n"));
    return quote;
  }
  if (rows.length > 1 && rows[0].includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(rows[1])) return table(rows);
  if (isItem(rows[0])) return list(rows);
  return paragraph(rows);
}

function paragraph(rows) {
  const node = el("p");
  rows.forEach((row, at) => {
    if (at) node.append(el("br"));
    fill(node, row);
  });
  return node;
}

function code(rows, language) {
  const closed = rows.length > 1 && /^ {0,3}(`{3,}|~{3,})\s*$/.test(rows.at(-1));
  const text = rows.slice(1, closed ? -1 : undefined).join("\n");
  return el("div", { class: "code" },
    el("div", { class: "code-head" }, el("span", { class: "dim small", text: language }), copyButton(() => text)),
    el("pre", { tabindex: "0" }, el("code", { text })));
}

function list(rows) {
  const first = rows[0].match(/^(\s*)([-*+]|\d{1,9})/);
  const node = /\d/.test(first[2]) ? el("ol", { start: Number(first[2]) }) : el("ul");
  const indent = first[1].length;
  let item = null;
  let inner = [];
  const end = () => { if (item && inner.length) item.append(isItem(inner[0]) ? list(inner) : paragraph(inner)); inner = []; };
  for (const row of rows) {
    const mark = row.match(/^(\s*)(?:[-*+]|\d{1,9}[.)])\s+(.*)$/);
    if (mark && mark[1].length <= indent + 1) {
      end();
      item = fill(el("li"), mark[2]);
      node.append(item);
    } else if (item && mark) inner.push(row);
    else if (item && inner.length) inner.push(row);
    else if (item) { item.append(" "); fill(item, row.trim()); }
  }
  end();
  return node;
}

function table(rows) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((one) => one.trim());
  return scrolling("Table", el("table", {},
    el("thead", {}, el("tr", {}, ...cells(rows[0]).map((one) => fill(el("th", { scope: "col" }), one)))),
    el("tbody", {}, ...rows.slice(2).map((row) => el("tr", {}, ...cells(row).map((one) => fill(el("td"), one)))))));
}

const INLINE = /(`+)([\s\S]+?)\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|__(?=\S)([\s\S]*?\S)__|\*(?=\S)([^*\n]*?\S)\*|(?<!\w)_(?=\S)([^_\n]*?\S)_(?!\w)|~~(?=\S)([\s\S]*?\S)~~|\[([^\]\n]+)\]\(([^()\s]+)(?:\s+"[^"]*")?\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/g;

function fill(node, text, depth = 0) {
  let at = 0;
  for (const found of depth > 4 ? [] : text.matchAll(INLINE)) {
    node.append(text.slice(at, found.index));
    at = found.index + found[0].length;
    const [, , inlineCode, bold, bold2, italic, italic2, struck, label, target, bare] = found;
    if (inlineCode !== undefined) node.append(el("code", { text: inlineCode.trim() || inlineCode }));
    else if ((bold ?? bold2) !== undefined) node.append(fill(el("strong"), bold ?? bold2, depth + 1));
    else if ((italic ?? italic2) !== undefined) node.append(fill(el("em"), italic ?? italic2, depth + 1));
    else if (struck !== undefined) node.append(fill(el("s"), struck, depth + 1));
    else node.append(link(label ?? bare, target ?? bare));
  }
  node.append(text.slice(at));
  return node;
}

function link(label, target) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return label === target ? target : `${label} (${target})`;
  return el("a", { href: target, rel: "noopener noreferrer", target: "_blank", text: label });
}
