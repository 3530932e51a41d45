"use strict";
// What a model wrote, shown so that nothing in it is invisible and nothing in it can rearrange the page.

const LONGEST_TOKEN = 400;
const INVISIBLE = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ufffd]|[\u{e0000}-\u{e0fff}]|\p{Cs}/u;
const JOINERS = /^[\u200c\u200d\ufe0f]$/u;

// Nodes for a text: characters that cannot be seen, or that change the direction of others, become small marks.
function shownText(text, { longest = Infinity, joinersShow = true } = {}) {
  const kept = text.length > longest ? text.slice(0, longest) : text;
  const nodes = [];
  let plain = "";
  for (const character of kept) {
    if (character === "\n") {
      plain += "\u23ce\n";
    } else if (INVISIBLE.test(character) && !(JOINERS.test(character) && !joinersShow)) {
      if (plain) nodes.push(document.createTextNode(plain));
      plain = "";
      nodes.push(element("span", { class: "mark" }, markOf(character)));
    } else {
      plain += character;
    }
  }
  if (plain) nodes.push(document.createTextNode(plain));
  if (kept.length < text.length) nodes.push(element("span", { class: "mark" }, `… ${(text.length - kept.length).toLocaleString("en")} more characters`));
  return nodes;
}

function markOf(character) {
  const names = { "\t": "tab", "\r": "CR", "\0": "NUL", "\ufffd": "part of a character", "\u200d": "joiner" };
  return names[character] || `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

// A joiner is part of an emoji where something stands beside it, and a mark of its own where nothing does.
function tokenText(text) {
  return shownText(text, { longest: LONGEST_TOKEN, joinersShow: [...text].length === 1 });
}

function proseText(text) {
  return shownText(text, { joinersShow: false });
}

// Some characters around the first place where the query stands, with it marked; the beginning where there is none.
function excerpt(text, query, length = 90) {
  const found = query ? text.toLowerCase().indexOf(query) : -1;
  const begins = Math.max(0, found < 0 ? 0 : found - 24);
  const cut = (from, to) => proseText(text.slice(from, to).replace(/\s+/g, " "));
  if (found < 0) return cut(0, length);
  return [
    begins > 0 ? "…" : "",
    ...cut(begins, found),
    element("mark", {}, ...cut(found, found + query.length)),
    ...cut(found + query.length, begins + length),
  ];
}
