"use strict";
// Small line charts in SVG. All charts that share a bus show the same place on hover.

const MARGIN = { left: 46, right: 12, top: 8, bottom: 22 };

class Bus {
  constructor() {
    this.listeners = [];
  }
  tell(x) {
    for (const listener of this.listeners) listener(x);
  }
}

// series: [{label, x: [...], y: [number|null ...], bars}]. Where y is null the curve has a gap.
// options: {height, bus, xName, zero, square, domain}. Returns a figure that redraws itself when its width changes.
function lineChart(series, options = {}) {
  const { height = 150, bus = new Bus(), xName = "step" } = options;
  const svg = drawn("svg", { height, role: "img", tabindex: 0, "aria-label": chartLabel(series, xName) });
  const legend = element("div", { class: "legend" });
  const readings = series.map((one, place) => {
    const reading = element("span", { class: "reading" });
    const line = drawn("line", { class: `curve series-${(place % 6) + 1}`, x1: 0, x2: 20, y1: 5, y2: 5 });
    const sample = drawn("svg", { width: 20, height: 10, "aria-hidden": "true" }, line);
    legend.append(element("span", { class: "entry" }, sample, one.label, reading));
    return reading;
  });
  const at = element("span", { class: "entry reading" });
  legend.append(at);
  const figure = element("figure", { class: "chart" }, svg, legend);
  const places = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  let scale = null;
  let current = null;

  function draw() {
    const width = svg.clientWidth;
    if (width === 0) return;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    scale = scales(series, width, height, options);
    svg.replaceChildren(...axes(scale, width, height), ...series.flatMap((one, place) => curve(one, place, scale)));
    if (current !== null) show(current);
  }

  function show(x) {
    svg.querySelector(".cursor")?.remove();
    current = x;
    if (x === null || scale === null) {
      at.textContent = "";
      for (const [place, one] of series.entries()) readings[place].textContent = shortNumber(lastOf(one.y));
      return;
    }
    at.textContent = `${xName} ${x}`;
    for (const [place, one] of series.entries()) {
      const found = one.x.indexOf(x);
      readings[place].textContent = found < 0 ? "" : shortNumber(one.y[found]);
    }
    const across = scale.x(x);
    svg.append(drawn("line", { class: "cursor", x1: across, x2: across, y1: MARGIN.top, y2: height - MARGIN.bottom }));
  }

  function nearest(event) {
    const box = svg.getBoundingClientRect();
    const wanted = scale.xBack(event.clientX - box.left);
    return places.reduce((best, x) => (Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best), places[0]);
  }

  svg.addEventListener("pointermove", (event) => scale && places.length && bus.tell(nearest(event)));
  svg.addEventListener("pointerleave", () => bus.tell(null));
  svg.addEventListener("blur", () => bus.tell(null));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined || places.length === 0) return;
    event.preventDefault();
    event.stopPropagation();
    const here = current === null ? (step > 0 ? -1 : places.length) : places.indexOf(current);
    bus.tell(places[Math.max(0, Math.min(places.length - 1, here + step))]);
  });
  bus.listeners.push(show);
  new ResizeObserver(draw).observe(svg);
  show(null);
  figure.scaleOf = () => scale;
  return figure;
}

function lastOf(values) {
  return values.findLast((value) => value !== null) ?? null;
}

function chartLabel(series, xName) {
  const said = series.map((one) => `${one.label} from ${shortNumber(one.y.find((y) => y !== null))} to ${shortNumber(lastOf(one.y))}`);
  return `Chart by ${xName}: ${said.join("; ")}`;
}

function scales(series, width, height, options) {
  const xs = extent(series.flatMap((one) => one.x));
  const ys = extent(series.flatMap((one) => one.y.filter((y) => y !== null)));
  if (options.zero) {
    ys.low = Math.min(ys.low, 0);
    ys.high = Math.max(ys.high, 0);
  }
  const { ticks, low, high } = niceTicks(ys.low, ys.high, Math.max(2, Math.floor(height / 42)));
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const xSpan = xs.high - xs.low || 1;
  return {
    ticks,
    low,
    high,
    xs,
    x: (value) => MARGIN.left + ((value - xs.low) / xSpan) * inner.width,
    xBack: (pixel) => xs.low + ((pixel - MARGIN.left) / inner.width) * xSpan,
    y: (value) => MARGIN.top + (1 - (value - low) / (high - low)) * inner.height,
  };
}

// Not by spreading into Math.min: a long run has more points than a call may have arguments.
function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? { low, high } : { low: 0, high: 1 };
}

// Round numbers that cover the range.
function niceTicks(low, high, count) {
  if (low === high) {
    const room = Math.abs(low) * 0.1 || 1;
    [low, high] = [low - room, high + room];
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  const ticks = [];
  for (let n = first; n <= last; n += 1) ticks.push(Number((n * step).toPrecision(12)));
  return { ticks, low: ticks[0], high: ticks[ticks.length - 1] };
}

function axes(scale, width, height) {
  const nodes = [];
  for (const tick of scale.ticks) {
    const y = scale.y(tick);
    nodes.push(drawn("line", { class: tick === 0 ? "zero" : "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
    nodes.push(drawn("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, tickLabel(tick, scale.ticks)));
  }
  for (const tick of xTicks(scale.xs, Math.max(1, Math.floor(width / 90)))) {
    nodes.push(drawn("text", { x: scale.x(tick), y: height - 5, "text-anchor": "middle" }, shortNumber(tick)));
  }
  return nodes;
}

function xTicks({ low, high }, count) {
  if (low === high) return [low];
  const step = Math.max(1, niceTicks(low, high, count).ticks.reduce((a, b, n, all) => (n ? b - all[n - 1] : a)));
  const whole = Math.max(1, Math.round(step));
  const ticks = [];
  for (let x = Math.ceil(low / whole) * whole; x <= high; x += whole) ticks.push(x);
  return ticks;
}

function tickLabel(value, ticks) {
  const step = Math.abs(ticks[1] - ticks[0]);
  const largest = Math.max(...ticks.map(Math.abs));
  if (largest >= 1e5 || (largest < 1e-3 && largest > 0)) return value === 0 ? "0" : minus(value.toExponential(step < 10 ** Math.floor(Math.log10(largest)) ? 1 : 0));
  const decimals = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9)));
  const needed = Number.isInteger(Number((step * 10 ** decimals).toPrecision(6))) ? decimals : decimals + 1;
  return minus(value.toFixed(needed));
}

// A curve, broken where a value is missing, with dots where it has few points.
function curve(one, place, scale) {
  const number = (place % 6) + 1;
  const points = thinned(one.x.map((x, n) => [scale.x(x), one.y[n] === null ? null : scale.y(one.y[n])]));
  let path = "";
  let open = false;
  for (const [x, y] of points) {
    if (y !== null) path += `${open ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`;
    open = y !== null;
  }
  const nodes = [drawn("path", { class: `curve series-${number}`, d: path })];
  if (points.length <= 24) {
    for (const [x, y] of points) if (y !== null) nodes.push(drawn("circle", { class: `dot-${number}`, cx: x, cy: y, r: 2.4 }));
  }
  return nodes;
}

// Of many points on one pixel column the first, the lowest, the highest and the last are all that can be seen.
function thinned(points) {
  if (points.length <= 2000) return points;
  const columns = new Map();
  for (const point of points) {
    const column = Math.round(point[0]);
    const found = columns.get(column);
    if (found === undefined) columns.set(column, { first: point, low: point, high: point, last: point, gap: point[1] === null });
    else {
      if (point[1] !== null && (found.low[1] === null || point[1] < found.low[1])) found.low = point;
      if (point[1] !== null && (found.high[1] === null || point[1] > found.high[1])) found.high = point;
      found.last = point;
    }
  }
  return [...columns.values()].flatMap(({ first, low, high, last }) => [...new Set([first, low, high, last])].sort((a, b) => a[0] - b[0]));
}
