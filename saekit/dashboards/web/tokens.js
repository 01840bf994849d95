"use strict";
// Tokens and numbers as people read them.  Texts only ever become text nodes, so nothing in them is markup.

// An element with attributes and children, which are elements or texts.
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const UNSEEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

// A text in which nothing is invisible: signs for ends of lines and tabs, codes for what has no shape.
function marked(text) {
  return text
    .replace(/\r\n|[\n\r]/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(UNSEEN, (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// A token inside a text: its spaces are spaces, unless they are all of it, or end it.
function inText(text) {
  if (text === "") return "∅";
  const shown = marked(text);
  return /[^ ⏎⇥]/.test(shown) ? shown.replace(/ {2,}/g, dots) : shown.replace(/ +/g, dots);
}

// A token by itself: every space is seen, but for the one before a word.
function alone(text) {
  if (text === "") return "∅";
  return marked(text).replace(/^ (?=[^ ⏎⇥])/, "").replace(/ +/g, dots);
}

function dots(spaces) {
  return spaces.length <= 8 ? "·".repeat(spaces.length) : `·×${spaces.length}`;
}

// As a programmer would write it.
function quoted(text) {
  return JSON.stringify(text).replace(UNSEEN, (character) => `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`);
}

// What a token is, where its text does not say it.
function remark(text) {
  if (text === "") return "stands for no text";
  if (text.includes("\ufffd")) return "bytes that are a part of a character";
  return "";
}

const TRUE_MINUS = "\u2212";

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  let text;
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) text = value.toExponential(digits - 1).replace("e+", "e");
  else text = size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(digits)));
  return text.replace("-", TRUE_MINUS);
}

// With so many digits after the point, so that columns line up.
function fixed(value, digits = 2) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text.replace("-", TRUE_MINUS);
}

function signed(value, digits = 2) {
  return value > 0 ? `+${fixed(value, digits)}` : fixed(value, digits);
}

function percent(fraction) {
  if (fraction === null || fraction === undefined) return "–";
  const value = 100 * fraction;
  if (value === 0) return "0%";
  return value < 0.001 ? `${value.toExponential(1)}%` : `${Number(value.toPrecision(value < 0.1 ? 2 : 3))}%`;
}

function whole(value) {
  return value.toLocaleString("en-US");
}
