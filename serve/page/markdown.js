// SPDX-License-Identifier: Apache-2.0
// A small part of Markdown as elements: code, headings, lists, tables, quotes, bold, italic. Anything else is text,
// and links are text, too: an answer can lead nobody anywhere.

import { make } from "./dom.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^( *)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const RULER = /^ *\|?( *:?-+:? *\|)+ *:?-* *:? *$/; // under a table's head
const INLINE = /(?<!`)(`{1,2})(?!`)([\s\S]+?)(?<!`)\1(?!`)|\*\*(?=\S)([\s\S]+?)\*\*|\*(?=[^\s*])([^*]+?)\*(?!\*)/;

const shown = new WeakMap(); // element → the source of each of its children

// Shows text in an element. Children whose source is the same stay: a stream touches only its end.
export function showMarkdown(element, text) {
  const before = shown.get(element) ?? [];
  const blocks = split(text);
  let same = 0;
  while (same < blocks.length && same < before.length && blocks[same] === before[same]) same++;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...blocks.slice(same).map(block));
  shown.set(element, blocks);
}

// Paragraphs and what else stands between empty lines; a fence goes to its end, empty lines and all.
function split(text) {
  const blocks = [];
  let lines = [];
  let fence = "";
  const end = () => {
    if (lines.length) blocks.push(lines.join("\n"));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line);
    if (fence) {
      lines.push(line);
      if (mark && mark[1].startsWith(fence) && !mark[2]) {
        fence = "";
        end();
      }
    } else if (mark) {
      end();
      fence = mark[1];
      lines.push(line);
    } else if (!line.trim()) {
      end();
    } else {
      if (HEADING.test(line) || kindOf(line) !== kindOf(lines.at(-1) ?? line)) end();
      lines.push(line);
      if (HEADING.test(line)) end();
    }
  }
  end();
  return blocks;
}

// Neighbouring lines of one kind are a block. What is indented goes on with a list.
function kindOf(line) {
  if (ITEM.test(line)) return "list";
  if (line.startsWith(">")) return "quote";
  if (line.trimStart().startsWith("|")) return "table";
  return /^ {2,}/.test(line) ? "list" : "text";
}

function block(source) {
  const lines = source.split("\n");
  const mark = FENCE.exec(lines[0]);
  if (mark) return code(lines, mark);
  const heading = HEADING.exec(lines[0]);
  if (heading) return make(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2]));
  if (ITEM.test(lines[0])) return list(lines);
  if (lines[0].startsWith(">")) {
    return make("blockquote", {}, ...inline(lines.map((line) => line.replace(/^> ?/, "")).join("\n")));
  }
  if (lines.length > 1 && RULER.test(lines[1])) return table(lines);
  return make("p", {}, ...inline(source));
}

function code(lines, [, fence]) {
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const inner = lines.slice(1, closed ? -1 : undefined).join("\n");
  return make("pre", { tabIndex: 0 }, make("code", {}, inner)); // reached by the keyboard, to scroll
}

// Items one under the other; deeper ones are lists inside.
function list(lines) {
  const first = ITEM.exec(lines[0]);
  const made = make(first[2] ? "ol" : "ul");
  if (first[2]) made.start = Number(first[2]);
  let inner = [];
  const close = () => {
    if (inner.length && ITEM.test(inner[0])) made.lastChild.append(list(inner));
    else if (inner.length) made.lastChild.append("\n", ...inline(inner.map((line) => line.trim()).join("\n")));
    inner = [];
  };
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length) {
      close();
      made.append(make("li", {}, ...inline(item[3])));
    } else {
      inner.push(line);
    }
  }
  close();
  return made;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (line, tag) => make("tr", {}, ...cells(line).map((cell) => make(tag, {}, ...inline(cell.trim()))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  const made = make("table", {}, make("thead", {}, row(lines[0], "th")), make("tbody", {}, ...body));
  return make("div", { className: "table", tabIndex: 0 }, made);
}

function inline(text) {
  const made = [];
  for (let rest = text; rest; ) {
    const found = INLINE.exec(rest);
    const end = found ? found.index : rest.length;
    if (end > 0) made.push(rest.slice(0, end));
    if (!found) break;
    const [all, , inCode, bold, italic] = found;
    if (inCode !== undefined) made.push(make("code", {}, inCode.trim()));
    else if (bold !== undefined) made.push(make("strong", {}, ...inline(bold)));
    else made.push(make("em", {}, ...inline(italic)));
    rest = rest.slice(end + all.length);
  }
  return made;
}
