"use strict";
// Blue for above the neutral point, orange for below: a pair that every common kind of colour blindness tells apart.
// Steps are even to the eye, since colours are mixed in OKLab (Ottosson 2020). The ends are chosen so that the text on
// them keeps a contrast of at least 4.5 to 1; the neutral colour is the page's surface.

const ENDS = {
  light: { neutral: "#ffffff", above: "#58a6f0", below: "#f28a2e" },
  dark: { neutral: "#161a20", above: "#1d5fae", below: "#964a00" },
};

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// A function from a share in [-1, 1] to a CSS colour, for the theme of the moment.
function palette() {
  const ends = ENDS[isDark() ? "dark" : "light"];
  const neutral = toOklab(ends.neutral);
  const above = toOklab(ends.above);
  const below = toOklab(ends.below);
  return (share) => {
    const held = Math.max(-1, Math.min(1, share));
    const end = held < 0 ? below : above;
    return toCss(neutral.map((from, n) => from + (end[n] - from) * Math.abs(held)));
  };
}

// How far a value is from its quantity's neutral point, as a share of the distance at which colours are full.
function shareOf(quantity, value) {
  if (value === null || value === undefined) return null;
  const distance = quantity.scale === "log" ? Math.log(value) : value - quantity.middle;
  return distance / quantity.limit;
}

function toOklab(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => {
    const part = parseInt(hex.slice(at, at + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function toCss([L, a, b]) {
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const parts = linear.map((part) => {
    const held = Math.max(0, Math.min(1, part));
    return Math.round(255 * (held <= 0.0031308 ? 12.92 * held : 1.055 * held ** (1 / 2.4) - 0.055));
  });
  return `rgb(${parts.join(" ")})`;
}
