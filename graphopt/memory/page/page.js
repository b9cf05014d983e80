"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const TYPES = {f8: Float64Array, u1: Uint8Array, u4: Uint32Array};
function array(text, type) {
  const raw = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new TYPES[type](raw.buffer);
}
const begin = array(data.begin, "f8"), stop = array(data.stop, "f8");
const offset = array(data.offset, "f8"), size = array(data.size, "f8");
const category = array(data.category, "u1"), label = array(data.label, "u4");
const index = array(data.index, "u4"), curveTime = array(data.curveTime, "f8");
const curves = Object.entries(data.curves).map(([name, text]) => [name, array(text, "f8")]);
const timed = data.clock !== "operation index";

// Text.
function bytes(n) {
  for (const [limit, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]])
    if (n >= limit) return (n / limit).toPrecision(3) + " " + unit;
  return n.toFixed(0) + " B";
}
function time(n) {
  if (!timed) return n.toFixed(0) + " ops";
  for (const [limit, unit] of [[1e9, "s"], [1e6, "ms"], [1e3, "us"]])
    if (n >= limit) return +(n / limit).toPrecision(4) + " " + unit;
  return n.toFixed(0) + " ns";
}

// Colours follow the theme of the page.
const NAMES = {activation: "attention", weight: "norm", other: "other"};
const style = getComputedStyle(document.documentElement);
function colour(name) { return style.getPropertyValue("--" + (NAMES[name] || name)).trim(); }
let ink = {};
function readColours() {
  ink = {text: colour("text"), dim: colour("dim"), line: colour("line"), card: colour("card"),
         accent: colour("accent"), bad: colour("bad"), attention: colour("attention"),
         ffn: colour("ffn"), norm: colour("norm")};
  ink.of = data.categories.map(colour);
}

// A canvas with as many pixels as the screen shows; drawing is in CSS pixels.
function prepare(canvas) {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(box.width)), height = Math.max(1, Math.round(box.height));
  if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
    canvas.width = width * ratio;
    canvas.height = height * ratio;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif";
  return [pen, width, height];
}

// What part of time, and of the bytes, is shown.
const whole = {x0: data.start, x1: data.end, y0: 0, y1: Math.max(data.height, 1) * 1.02};
let view = {...whole};
const gantt = document.getElementById("gantt"), curve = document.getElementById("curve");
const told = document.getElementById("told");

function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(m => m * power >= raw) * power, found = [];
  for (let at = Math.ceil(low / step) * step; at <= high; at += step) found.push(at);
  return found;
}

// Text over a picture, with an edge that sets it off.
function write(pen, text, x, y) {
  pen.strokeStyle = ink.card; pen.lineWidth = 3; pen.lineJoin = "round";
  pen.strokeText(text, x, y);
  pen.lineWidth = 1; pen.fillStyle = ink.text;
  pen.fillText(text, x, y);
}

function drawBlocks() {
  const [pen, width, height] = prepare(gantt);
  const sx = width / (view.x1 - view.x0), sy = height / (view.y1 - view.y0);
  let now = -1, drawn = 0;
  for (let n = 0; n < begin.length; n++) {
    if (stop[n] < view.x0 || begin[n] > view.x1) continue;
    if (offset[n] > view.y1 || offset[n] + size[n] < view.y0) continue;
    if (category[n] !== now) { now = category[n]; pen.fillStyle = ink.of[now]; }
    const x = Math.max((begin[n] - view.x0) * sx, -1);
    const wide = Math.min((stop[n] - view.x0) * sx, width + 1) - x;
    const tall = size[n] * sy, y = height - (offset[n] - view.y0) * sy - tall;
    // A gap tells large blocks from each other; nothing is thinner than a thin line.
    pen.fillRect(x, y, Math.max(wide - (wide > 3 ? 0.5 : 0), 0.6),
                 Math.max(tall - (tall > 3 ? 0.5 : 0), 0.6));
    drawn++;
  }
  const at = (data.peakTime - view.x0) * sx;
  pen.strokeStyle = ink.bad;
  pen.beginPath(); pen.moveTo(at, 0); pen.lineTo(at, height); pen.stroke();
  for (const tick of ticks(view.y0, view.y1, 5))
    if (tick > view.y0) write(pen, bytes(tick), 4, height - (tick - view.y0) * sy + 4);
  axisOfTime(pen, width, height);
  gantt.dataset.drawn = drawn;
}

function axisOfTime(pen, width, height) {
  const sx = width / (view.x1 - view.x0);
  for (const tick of ticks(view.x0, view.x1, Math.max(2, width / 130))) {
    const x = (tick - view.x0) * sx;
    if (x > 40 && x < width - 60) write(pen, time(tick), x + 3, height - 4);
  }
}

function drawCurve() {
  const [pen, width, height] = prepare(curve);
  const sx = width / (view.x1 - view.x0), top = Math.max(data.peak, 1) * 1.08;
  const count = curveTime.length, below = new Float64Array(count);
  for (const [name, live] of curves) {
    pen.fillStyle = ink.of[data.categories.indexOf(name)];
    pen.beginPath();
    for (let n = 0; n < count; n++) {
      const x = (curveTime[n] - view.x0) * sx, next = n + 1 < count ? curveTime[n + 1] : data.end;
      const y = height - (below[n] + live[n]) / top * height;
      pen.lineTo(x, y);
      pen.lineTo((next - view.x0) * sx, y);
    }
    for (let n = count - 1; n >= 0; n--) {
      const next = n + 1 < count ? curveTime[n + 1] : data.end, y = height - below[n] / top * height;
      pen.lineTo((next - view.x0) * sx, y);
      pen.lineTo((curveTime[n] - view.x0) * sx, y);
    }
    pen.fill();
    for (let n = 0; n < count; n++) below[n] += live[n];
  }
  const y = height - data.peak / top * height;
  pen.strokeStyle = ink.bad;
  pen.setLineDash([4, 3]);
  pen.beginPath(); pen.moveTo(0, y); pen.lineTo(width, y); pen.stroke();
  pen.setLineDash([]);
  write(pen, "peak " + bytes(data.peak), 4, y + 14);
  axisOfTime(pen, width, height);
}

// Plots with logarithmic axes.
function decades(low, high) {
  const found = [];
  for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power++) found.push(10 ** power);
  return found;
}
function extent(values) {
  let low = Infinity, high = 0;
  for (const value of values) if (value > 0) { low = Math.min(low, value); high = Math.max(high, value); }
  return high > 0 ? [low / 1.5, high * 1.5] : [1, 10];
}
function logAxes(pen, width, height, xs, ys) {
  const left = 52, bottom = 20;
  const x = v => left + Math.log(v / xs[0]) / Math.log(xs[1] / xs[0]) * (width - left - 8);
  const y = ys ? v => height - bottom - Math.log(v / ys[0]) / Math.log(ys[1] / ys[0]) * (height - bottom - 8)
               : v => height - bottom - v * (height - bottom - 8);
  pen.strokeStyle = ink.line;
  pen.fillStyle = ink.text;
  const every = Math.ceil(decades(...xs).length / Math.max(2, (width - left) / 70));
  decades(...xs).forEach((v, n) => {
    pen.beginPath(); pen.moveTo(x(v), 8); pen.lineTo(x(v), height - bottom); pen.stroke();
    if (n % every === 0) pen.fillText(time(v), Math.min(x(v) - 8, width - 40), height - 6);
  });
  for (const v of ys ? decades(...ys) : [0, 0.25, 0.5, 0.75, 1]) {
    pen.beginPath(); pen.moveTo(left, y(v)); pen.lineTo(width - 8, y(v)); pen.stroke();
    pen.fillText(ys ? bytes(v) : v * 100 + " %", 4, y(v) + 4);
  }
  return [x, y];
}
function line(pen, points, ink, dash) {
  pen.strokeStyle = ink; pen.lineWidth = 2; pen.setLineDash(dash || []);
  pen.beginPath();
  points.forEach(([x, y]) => pen.lineTo(x, y));
  pen.stroke();
  pen.lineWidth = 1; pen.setLineDash([]);
}

const cdfGap = array(data.cdfGap, "f8"), cdfShare = array(data.cdfShare, "f8");
const pointGap = array(data.pointGap, "f8"), pointSize = array(data.pointSize, "f8");
const pointFits = array(data.pointFits, "u1");
function drawDistribution() {
  const canvas = document.getElementById("cdf");
  const [pen, width, height] = prepare(canvas), xs = extent(cdfGap);
  if (!timed) xs[0] = Math.min(xs[0], 0.9);
  else { xs[0] = Math.min(xs[0], 1e4); xs[1] = Math.max(xs[1], 1e5); }
  const [x, y] = logAxes(pen, width, height, xs, null);
  const points = Array.from(cdfGap, (gap, n) => [x(Math.max(gap, xs[0])), y(cdfShare[n])]);
  line(pen, points, ink.attention);
  if (timed) {
    line(pen, [[x(25e3), y(0)], [x(25e3), y(1)]], ink.bad, [4, 3]);
    pen.fillStyle = ink.text;
    pen.fillText("25 us", x(25e3) + 4, y(0) - 6);
  }
}
function drawScatter() {
  const canvas = document.getElementById("scatter");
  const [pen, width, height] = prepare(canvas), xs = extent(pointGap), ys = extent(pointSize);
  const [x, y] = logAxes(pen, width, height, xs, ys);
  for (let n = 0; n < pointGap.length; n++) {
    if (pointGap[n] <= 0) continue;
    pen.fillStyle = pointFits[n] ? ink.ffn : ink.norm;
    const r = pointFits[n] ? 3 : 2;
    pen.fillRect(x(pointGap[n]) - r / 2, y(pointSize[n]) - r / 2, r, r);
  }
  if (!timed) return;
  const [out, back, outLatency, backLatency] = data.link, points = [];
  for (let n = 0; n <= 200; n++) {
    const gap = xs[0] * (xs[1] / xs[0]) ** (n / 200);
    const hidden = (gap - outLatency - backLatency) / 1e9 / (1 / out + 1 / back);
    if (hidden > ys[0] && hidden < ys[1]) points.push([x(gap), y(hidden)]);
  }
  line(pen, points, ink.bad, [6, 3]);
}

// Moving about.
let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawBlocks(); drawCurve(); });
}
function clamp() {
  const least = (whole.x1 - whole.x0) * 1e-7 || 1;
  if (view.x1 - view.x0 < least) view.x1 = view.x0 + least;
  for (const [low, high] of [["x0", "x1"], ["y0", "y1"]]) {
    const span = Math.min(view[high] - view[low], whole[high] - whole[low]);
    view[low] = Math.min(Math.max(view[low], whole[low]), whole[high] - span);
    view[high] = view[low] + span;
  }
}
function zoom(factor, fx, fy, vertical) {
  const x = view.x0 + fx * (view.x1 - view.x0), y = view.y0 + fy * (view.y1 - view.y0);
  view.x0 = x - (x - view.x0) * factor; view.x1 = x + (view.x1 - x) * factor;
  if (vertical) { view.y0 = y - (y - view.y0) * factor; view.y1 = y + (view.y1 - y) * factor; }
  clamp(); redraw();
}
function move(dx, dy) {
  view.x0 += dx; view.x1 += dx; view.y0 += dy; view.y1 += dy;
  clamp(); redraw();
}
const ACTS = {
  in: () => zoom(0.5, 0.5, 0.5), out: () => zoom(2, 0.5, 0.5, true),
  left: () => move((view.x0 - view.x1) / 4, 0), right: () => move((view.x1 - view.x0) / 4, 0),
  up: () => move(0, (view.y1 - view.y0) / 4), down: () => move(0, (view.y0 - view.y1) / 4),
  all: () => { view = {...whole}; redraw(); },
  peak: () => {
    const span = (whole.x1 - whole.x0) / 20;
    view = {...whole, x0: data.peakTime - span / 2, x1: data.peakTime + span / 2};
    clamp(); redraw();
  },
};
for (const button of document.querySelectorAll("[data-act]"))
  button.addEventListener("click", () => ACTS[button.dataset.act]());
const KEYS = {"+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right",
              ArrowUp: "up", ArrowDown: "down", "0": "all"};
gantt.addEventListener("keydown", event => {
  if (KEYS[event.key]) { ACTS[KEYS[event.key]](); event.preventDefault(); }
});
gantt.addEventListener("wheel", event => {
  const box = gantt.getBoundingClientRect();
  zoom(event.deltaY > 0 ? 1.25 : 0.8, (event.clientX - box.left) / box.width,
       1 - (event.clientY - box.top) / box.height, event.shiftKey);
  event.preventDefault();
}, {passive: false});
let held = null;
gantt.addEventListener("pointerdown", event => { held = [event.clientX, event.clientY]; });
addEventListener("pointerup", () => { held = null; });
gantt.addEventListener("pointermove", event => {
  const box = gantt.getBoundingClientRect();
  if (held) {
    move((held[0] - event.clientX) / box.width * (view.x1 - view.x0),
         (event.clientY - held[1]) / box.height * (view.y1 - view.y0));
    held = [event.clientX, event.clientY];
    return;
  }
  const at = view.x0 + (event.clientX - box.left) / box.width * (view.x1 - view.x0);
  const height = view.y0 + (1 - (event.clientY - box.top) / box.height) * (view.y1 - view.y0);
  for (let n = begin.length - 1; n >= 0; n--) {
    if (begin[n] <= at && at <= stop[n] && offset[n] <= height && height <= offset[n] + size[n]) {
      told.textContent = `#${index[n]} ${data.labels[label[n]]}: ${bytes(size[n])}, ` +
        `${data.categories[category[n]]}, from ${time(begin[n])} to ${time(stop[n])}`;
      return;
    }
  }
});

function drawAll() { readColours(); drawBlocks(); drawCurve(); drawDistribution(); drawScatter(); }
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("resize", drawAll);
drawAll();
})();
